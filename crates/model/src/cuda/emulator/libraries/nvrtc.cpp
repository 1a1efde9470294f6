// NVRTC on the emulator: built as libnvrtc.so.13, it compiles a kernel's source with the system's C++ compiler into
// a library, which the emulated driver loads in place of machine code.
//
// Compiled with FOLDER, where emulator.h and runtime.o lie; CXX, the compiler, and FLAGS of it.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <fstream>
#include <regex>
#include <sstream>
#include <string>

#ifdef NVRTC_H
#include <nvrtc.h>
#else
typedef enum {
    NVRTC_SUCCESS = 0,
    NVRTC_ERROR_INVALID_INPUT = 3,
    NVRTC_ERROR_INVALID_PROGRAM = 4,
    NVRTC_ERROR_INVALID_OPTION = 5,
    NVRTC_ERROR_COMPILATION = 6,
} nvrtcResult;
typedef struct _nvrtcProgram* nvrtcProgram;
#endif

struct _nvrtcProgram {
    std::string source, code, log;
};

namespace {

const int ARCHITECTURES[] = {75, 80, 86, 89, 90, 100, 120};

// The instructions of ptx.cuh are replaced by the emulator's, and each kernel gets what the driver calls.
std::string for_the_emulator(const std::string& source) {
    size_t ptx = source.find("#line 1 \"ptx.cuh\""), common = source.find("#line 1 \"common.cuh\"");
    if (ptx == std::string::npos || common == std::string::npos) return source;
    std::string text = source.substr(0, ptx) + "#include \"emulator.h\"\nnamespace {\n" + source.substr(common) + "\n}\n";
    std::regex kernel("__global__\\s+void\\s+(?:__launch_bounds__\\([^)]*\\)\\s*)?(\\w+)\\s*\\(");
    for (std::sregex_iterator found(source.begin(), source.end(), kernel), end; found != end; ++found) {
        text += "EXPORT_KERNEL(" + (*found)[1].str() + ")\n";
    }
    return text;
}

std::string content(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream all;
    all << file.rdbuf();
    return all.str();
}

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) nvrtcResult

API nvrtcVersion(int* major, int* minor) {
    *major = 13;
    *minor = 0;
    return NVRTC_SUCCESS;
}

API nvrtcGetNumSupportedArchs(int* count) {
    *count = sizeof(ARCHITECTURES) / sizeof(int);
    return NVRTC_SUCCESS;
}

API nvrtcGetSupportedArchs(int* architectures) {
    memcpy(architectures, ARCHITECTURES, sizeof(ARCHITECTURES));
    return NVRTC_SUCCESS;
}

API nvrtcCreateProgram(nvrtcProgram* program, const char* source, const char*, int headers, const char* const*,
                       const char* const*) {
    if (headers != 0) return NVRTC_ERROR_INVALID_INPUT;
    *program = new _nvrtcProgram{source, "", ""};
    return NVRTC_SUCCESS;
}

API nvrtcDestroyProgram(nvrtcProgram* program) {
    delete *program;
    *program = nullptr;
    return NVRTC_SUCCESS;
}

API nvrtcCompileProgram(nvrtcProgram program, int count, const char* const* options) {
    std::string arch;
    for (int i = 0; i < count; i++) {
        if (strncmp(options[i], "--gpu-architecture=sm_", 22) == 0) arch = options[i] + 22;
    }
    if (arch.empty()) {
        program->log = "the emulator compiles for --gpu-architecture=sm_... only";
        return NVRTC_ERROR_INVALID_OPTION;
    }
    const char* temporary = getenv("TMPDIR");
    std::string folder = std::string(temporary ? temporary : "/tmp") + "/emulated-nvrtc-XXXXXX";
    if (!mkdtemp(&folder[0])) return NVRTC_ERROR_COMPILATION;
    std::string base = folder + "/kernel";
    std::ofstream(base + ".cpp") << for_the_emulator(program->source);
    std::string log = " 2>> '" + base + ".log'", number = std::to_string(10 * atoi(arch.c_str()));
    std::string command = CXX " " FLAGS " -D__CUDA_ARCH__=" + number + " -I'" FOLDER "' -c '" + base + ".cpp' -o '" + base
        + ".o'" + log + " && " CXX " -shared -Wl,-Bsymbolic '" + base + ".o' '" FOLDER "/runtime.o' -o '" + base + ".so'" + log;
    bool good = system(command.c_str()) == 0;
    program->code = good ? content(base + ".so") : "";
    program->log = content(base + ".log");
    for (const char* ending : {".cpp", ".o", ".so", ".log"}) unlink((base + ending).c_str());
    rmdir(folder.c_str());
    return good ? NVRTC_SUCCESS : NVRTC_ERROR_COMPILATION;
}

API nvrtcGetCUBINSize(nvrtcProgram program, size_t* bytes) {
    *bytes = program->code.size();
    return NVRTC_SUCCESS;
}

API nvrtcGetCUBIN(nvrtcProgram program, char* code) {
    memcpy(code, program->code.data(), program->code.size());
    return NVRTC_SUCCESS;
}

API nvrtcGetPTXSize(nvrtcProgram, size_t* bytes) {
    *bytes = 0;
    return NVRTC_SUCCESS;
}

API nvrtcGetPTX(nvrtcProgram, char*) { return NVRTC_ERROR_INVALID_PROGRAM; }

API nvrtcGetProgramLogSize(nvrtcProgram program, size_t* bytes) {
    *bytes = program->log.size() + 1;
    return NVRTC_SUCCESS;
}

API nvrtcGetProgramLog(nvrtcProgram program, char* log) {
    memcpy(log, program->log.c_str(), program->log.size() + 1);
    return NVRTC_SUCCESS;
}
