#!/bin/sh
# Builds the three emulated libraries and prints the folder where they lie: below FOLDER, under a name that changes
# with their sources and the compiler. What is there already is not built again.
#
#   build.sh FOLDER
#
# Then the real program takes a CPU for a GPU:
#   LD_LIBRARY_PATH=$(build.sh target) servelab serve --device cuda
#
# CXX names the C++ compiler, c++ if it is not set; GCC and Clang can check each load and store of a kernel.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cxx=${CXX:-c++}
mkdir -p "$1"
into=$(cd "$1" && pwd)

cd "$here"
"$cxx" --version > /dev/null
# The folder is part of it, since its path is compiled in.
key=$({ "$cxx" --version; echo "$into"; cat ../emulator.h ../runtime.cpp ./*; } | cksum | tr -d ' ')
out=$into/emulated-gpu-$key
if [ -e "$out/libnvrtc.so.13" ]; then
    echo "$out"
    exit
fi

making=$(mktemp -d "$into/making-XXXXXX")
trap 'rm -rf "$making"' EXIT
# A fortified longjmp takes jumps between fibers for an attack.
common="-std=c++17 -fPIC -fvisibility=hidden -U_FORTIFY_SOURCE"

# A call before each load and store: as GCC spells it, as Clang does, and none.
gcc="-fsanitize=kernel-address --param=asan-instrumentation-with-call-threshold=0 --param=asan-stack=0
    --param=asan-globals=0"
clang="-fsanitize=kernel-address -mllvm -asan-instrumentation-with-call-threshold=0 -mllvm -asan-stack=0
    -mllvm -asan-globals=0"
echo 'int probe(int* at) { return *at; }' > "$making/probe.cpp"
for checks in "$gcc" "$clang" ""; do
    # Some compilers take flags that they do not know.
    if "$cxx" $common $checks -c "$making/probe.cpp" -o "$making/probe.o" 2> /dev/null &&
        { [ -z "$checks" ] || grep -q __asan_load4_noabort "$making/probe.o"; }; then
        break
    fi
done

# Contraction of a product and a sum would round otherwise than the GPU is told to; aliasing rules are not CUDA's.
kernels="$common -O1 -ffp-contract=off -fno-strict-aliasing -Wno-unknown-pragmas"
cp "../emulator.h" "$making"
"$cxx" $kernels -I "$making" -c "../runtime.cpp" -o "$making/runtime.o"
"$cxx" $common -O2 -shared -Wl,-soname,libcuda.so.1 "./cuda.cpp" -o "$making/libcuda.so.1" -ldl -pthread
"$cxx" $common -O2 -shared -Wl,-soname,libcublasLt.so.13 "./cublaslt.cpp" "$making/libcuda.so.1" \
    -o "$making/libcublasLt.so.13"
"$cxx" $common -O2 -shared -Wl,-soname,libnvrtc.so.13 "-DFOLDER=\"$out\"" "-DCXX=\"$cxx\"" \
    "-DFLAGS=\"$(echo $kernels $checks)\"" "./nvrtc.cpp" -o "$making/libnvrtc.so.13"
rm "$making/probe.cpp" "$making/probe.o"
# The names that are asked for first: where NVIDIA's own libraries lie too, none of them shall answer.
ln -s libcuda.so.1 "$making/libcuda.so"
ln -s libcublasLt.so.13 "$making/libcublasLt.so"
ln -s libnvrtc.so.13 "$making/libnvrtc.so"
# Another process may have made the same meanwhile.
chmod 755 "$making"
mv -T "$making" "$out" 2> /dev/null || [ -e "$out/libnvrtc.so.13" ]
echo "$out"
