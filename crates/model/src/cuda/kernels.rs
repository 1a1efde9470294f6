//! The kernels: their sources, what they are specialised for, and their signatures.
//!
//! A kernel file is compiled at start for the GPU found and for the model that is served: sizes that
//! bound loops are macros, so that loops unroll and arrays stay in registers. What differs from step to
//! step is an argument. The tables here are compared with what the compiler makes of the sources, both
//! by the emulator and by the NVRTC test.

use std::fmt::Write;

use super::geometry::{DecodeTile, PrefillTile, norm_threads};
use super::gpu::{Arch, GpuError, GpuInfo};

/// How an argument is passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParameterKind {
    Pointer,
    U32,
    U64,
    F32,
}

/// One parameter of a kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct Parameter {
    pub name: &'static str,
    pub kind: ParameterKind,
}

/// A kernel that can be launched.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    pub name: &'static str,
    pub parameters: &'static [Parameter],
}

/// A source file with one or more kernels.
#[derive(Debug)]
pub struct KernelFile {
    pub name: &'static str,
    pub source: &'static str,
    /// Macros that have to be defined.
    pub macros: &'static [&'static str],
    /// Options of the compiler besides target and macros.
    pub options: &'static [&'static str],
    pub entries: &'static [&'static Entry],
}

/// Inline assembly as functions; the emulator puts functions of its own in their place.
pub const PTX_HEADER: &str = include_str!("kernels/ptx.cuh");
/// What several kernels share.
pub const COMMON_HEADER: &str = include_str!("kernels/common.cuh");

/// A kernel file with values for its macros.
#[derive(Clone, Debug)]
pub struct Module {
    pub file: &'static KernelFile,
    /// In the order of [`KernelFile::macros`].
    pub defines: Vec<(&'static str, u32)>,
}

impl Module {
    /// # Panics
    /// If the macros are not those of the file, in their order.
    pub fn new(file: &'static KernelFile, defines: Vec<(&'static str, u32)>) -> Self {
        let names: Vec<_> = defines.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, file.macros, "macros of {}", file.name);
        Self { file, defines }
    }

    /// The whole text that NVRTC compiles: it includes nothing.
    pub fn source(&self) -> String {
        self.source_after(PTX_HEADER, "ptx.cuh")
    }

    /// The same after another header than [`PTX_HEADER`], for the emulator.
    pub fn source_after(&self, header: &str, header_name: &str) -> String {
        let mut text = String::new();
        for (name, value) in &self.defines {
            let _ = writeln!(text, "#define {name} {value}");
        }
        let parts =
            [(header_name, header), ("common.cuh", COMMON_HEADER), (self.file.name, self.file.source)];
        for (name, source) in parts {
            let _ = writeln!(text, "#line 1 \"{name}\"\n{source}");
        }
        text
    }

    /// Options of NVRTC for a target such as `sm_90a`.
    pub fn options(&self, target: &str) -> Vec<String> {
        let common = [format!("--gpu-architecture={target}"), "--std=c++17".to_owned()];
        common.into_iter().chain(self.file.options.iter().map(|option| (*option).to_owned())).collect()
    }

    /// File and macros in one line, for logs and errors.
    pub fn title(&self) -> String {
        let macros: Vec<_> = self.defines.iter().map(|(name, value)| format!("{name}={value}")).collect();
        format!("{} {}", self.file.name, macros.join(" "))
    }
}

/// Format of weights and activations; the value of the macro `ELEMENT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    BF16 = 1,
    F16 = 2,
}

/// Format of cached keys and values. The value of the macro `KV` is that of [`Element`], or 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvElement {
    /// As the activations.
    Same,
    /// 8-bit floats with one scale for all keys and one for all values of a layer.
    E4M3,
}

impl KvElement {
    pub fn bytes(self) -> usize {
        match self {
            Self::Same => 2,
            Self::E4M3 => 1,
        }
    }

    fn macro_value(self, element: Element) -> u32 {
        match self {
            Self::Same => element as u32,
            Self::E4M3 => 3,
        }
    }
}

/// Head sizes that the attention kernels are written for.
pub const HEAD_DIMS: [u32; 6] = [32, 64, 80, 96, 128, 256];
/// Block sizes: whole tiles of 16 tokens.
pub const BLOCK_SIZES: [u32; 3] = [16, 32, 64];

/// Widest row of a norm: 4 vectors a thread.
pub const MOST_HIDDEN: u32 = 32_768;
/// Most query heads that share a key head.
pub const MOST_GROUP: u32 = 64;

/// What the kernels of one model are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Specialisation {
    pub element: Element,
    pub kv: KvElement,
    /// Width of the residual stream; a multiple of 8.
    pub hidden: u32,
    pub head_dim: u32,
    /// Query heads that share a key head.
    pub group: u32,
    pub block_size: u32,
    /// Whether queries and keys are normed head by head.
    pub head_norms: bool,
    pub decode: DecodeTile,
    pub prefill: PrefillTile,
}

impl Specialisation {
    /// Whether there are kernels for this shape and this GPU.
    ///
    /// # Errors
    /// [`GpuError::Refused`] with the value and what is allowed.
    pub fn check(&self, info: &GpuInfo) -> Result<(), GpuError> {
        let refused = |reason| Err(GpuError::Refused { what: "CUDA".to_owned(), reason });
        if info.arch < Arch::LEAST {
            return refused(format!("{} has compute capability {}; 8.0 or later", info.name, info.arch));
        }
        if self.kv == KvElement::E4M3 && !info.arch.has_fp8() {
            return refused(format!("an fp8 KV cache on compute capability {}; 8.9 or later", info.arch));
        }
        if !HEAD_DIMS.contains(&self.head_dim) {
            return refused(format!("head_dim {}; one of {HEAD_DIMS:?}", self.head_dim));
        }
        if !BLOCK_SIZES.contains(&self.block_size) {
            return refused(format!("block size {}; one of {BLOCK_SIZES:?}", self.block_size));
        }
        if self.hidden == 0 || !self.hidden.is_multiple_of(8) || self.hidden > MOST_HIDDEN {
            return refused(format!("hidden size {}; a multiple of 8 up to {MOST_HIDDEN}", self.hidden));
        }
        if self.group == 0 || self.group > MOST_GROUP {
            return refused(format!("{} query heads a key head; 1 to {MOST_GROUP}", self.group));
        }
        Ok(())
    }

    fn kv_macro(&self) -> u32 {
        self.kv.macro_value(self.element)
    }

    pub fn rows(&self) -> Module {
        Module::new(&ROWS, vec![])
    }

    pub fn norm(&self) -> Module {
        let (element, threads) = (self.element as u32, norm_threads(self.hidden));
        Module::new(&NORM, vec![("ELEMENT", element), ("WIDTH", self.hidden), ("THREADS", threads)])
    }

    pub fn rope(&self) -> Module {
        Module::new(
            &ROPE,
            vec![
                ("ELEMENT", self.element as u32),
                ("KV", self.kv_macro()),
                ("HEAD_DIM", self.head_dim),
                ("BLOCK_SIZE", self.block_size),
                ("HEAD_NORMS", u32::from(self.head_norms)),
            ],
        )
    }

    pub fn silu(&self) -> Module {
        Module::new(&SILU, vec![("ELEMENT", self.element as u32)])
    }

    pub fn decode(&self) -> Module {
        Module::new(
            &DECODE,
            vec![
                ("ELEMENT", self.element as u32),
                ("KV", self.kv_macro()),
                ("HEAD_DIM", self.head_dim),
                ("BLOCK_SIZE", self.block_size),
                ("GROUP", self.group),
                ("WARPS", self.decode.warps),
                ("STAGES", self.decode.stages),
            ],
        )
    }

    pub fn prefill(&self) -> Module {
        Module::new(
            &PREFILL,
            vec![
                ("ELEMENT", self.element as u32),
                ("KV", self.kv_macro()),
                ("HEAD_DIM", self.head_dim),
                ("BLOCK_SIZE", self.block_size),
                ("GROUP", self.group),
                ("ROWS", self.prefill.rows),
                ("KEYS", self.prefill.keys),
                ("WARPS", self.prefill.warps),
            ],
        )
    }

    pub fn sample(&self) -> Module {
        Module::new(&SAMPLE, vec![])
    }

    pub fn fp8(&self) -> Module {
        Module::new(&FP8, vec![("ELEMENT", self.element as u32)])
    }

    /// All that there are for a GPU.
    pub fn modules(&self, arch: Arch) -> Vec<Module> {
        let mut modules = vec![
            self.rows(),
            self.norm(),
            self.rope(),
            self.silu(),
            self.decode(),
            self.prefill(),
            self.sample(),
        ];
        modules.extend(arch.has_fp8().then(|| self.fp8()));
        modules
    }
}

const fn pointer(name: &'static str) -> Parameter {
    Parameter { name, kind: ParameterKind::Pointer }
}

const fn u32(name: &'static str) -> Parameter {
    Parameter { name, kind: ParameterKind::U32 }
}

const fn u64(name: &'static str) -> Parameter {
    Parameter { name, kind: ParameterKind::U64 }
}

const fn f32(name: &'static str) -> Parameter {
    Parameter { name, kind: ParameterKind::F32 }
}

pub static ROWS: KernelFile = KernelFile {
    name: "rows.cu",
    source: include_str!("kernels/rows.cu"),
    macros: &[],
    options: &[],
    entries: &[&EMBED, &GATHER_ROWS, &COPY_BLOCKS],
};

pub static EMBED: Entry = Entry {
    name: "embed",
    parameters: &[pointer("out"), pointer("table"), pointer("tokens"), pointer("chosen"), u32("row_vectors")],
};

pub static GATHER_ROWS: Entry = Entry {
    name: "gather_rows",
    parameters: &[pointer("out"), pointer("x"), pointer("rows"), u32("row_vectors")],
};

pub static COPY_BLOCKS: Entry = Entry {
    name: "copy_blocks",
    parameters: &[pointer("cache"), pointer("copies"), u32("block_vectors"), u64("layer_vectors")],
};

pub static NORM: KernelFile = KernelFile {
    name: "norm.cu",
    source: include_str!("kernels/norm.cu"),
    macros: &["ELEMENT", "WIDTH", "THREADS"],
    options: &[],
    entries: &[&RMS_NORM, &ADD_RMS_NORM],
};

pub static RMS_NORM: Entry =
    Entry { name: "rms_norm", parameters: &[pointer("out"), pointer("x"), pointer("weight"), f32("eps")] };

pub static ADD_RMS_NORM: Entry = Entry {
    name: "add_rms_norm",
    parameters: &[pointer("out"), pointer("x"), pointer("delta"), pointer("weight"), f32("eps")],
};

pub static ROPE: KernelFile = KernelFile {
    name: "rope.cu",
    source: include_str!("kernels/rope.cu"),
    macros: &["ELEMENT", "KV", "HEAD_DIM", "BLOCK_SIZE", "HEAD_NORMS"],
    options: &[],
    entries: &[&ROPE_AND_CACHE],
};

pub static ROPE_AND_CACHE: Entry = Entry {
    name: "rope_and_cache",
    parameters: &[
        pointer("queries"),
        pointer("cache"),
        pointer("qkv"),
        pointer("positions"),
        pointer("slots"),
        pointer("frequencies"),
        pointer("query_norm"),
        pointer("key_norm"),
        u32("heads"),
        u32("kv_heads"),
        f32("amplitude"),
        f32("eps"),
        f32("key_scale"),
        f32("value_scale"),
    ],
};

pub static SILU: KernelFile = KernelFile {
    name: "silu.cu",
    source: include_str!("kernels/silu.cu"),
    macros: &["ELEMENT"],
    options: &[],
    entries: &[&SILU_MUL],
};

pub static SILU_MUL: Entry =
    Entry { name: "silu_mul", parameters: &[pointer("out"), pointer("gate_up"), u32("inner")] };

pub static DECODE: KernelFile = KernelFile {
    name: "decode.cu",
    source: include_str!("kernels/decode.cu"),
    macros: &["ELEMENT", "KV", "HEAD_DIM", "BLOCK_SIZE", "GROUP", "WARPS", "STAGES"],
    options: &[],
    entries: &[&DECODE_ATTENTION],
};

pub static DECODE_ATTENTION: Entry = Entry {
    name: "decode_attention",
    parameters: &[
        pointer("out"),
        pointer("queries"),
        pointer("cache"),
        pointer("items"),
        pointer("item_count"),
        pointer("block_tables"),
        pointer("partial_values"),
        pointer("partial_sums"),
        pointer("arrivals"),
        u32("table_width"),
        u32("kv_heads"),
        f32("scale"),
        f32("key_scale"),
        f32("value_scale"),
    ],
};

pub static PREFILL: KernelFile = KernelFile {
    name: "prefill.cu",
    source: include_str!("kernels/prefill.cu"),
    macros: &["ELEMENT", "KV", "HEAD_DIM", "BLOCK_SIZE", "GROUP", "ROWS", "KEYS", "WARPS"],
    options: &[],
    entries: &[&PREFILL_ATTENTION],
};

pub static PREFILL_ATTENTION: Entry = Entry {
    name: "prefill_attention",
    parameters: &[
        pointer("out"),
        pointer("queries"),
        pointer("cache"),
        pointer("items"),
        pointer("block_tables"),
        u32("table_width"),
        u32("kv_heads"),
        u32("window"),
        f32("scale"),
        f32("key_scale"),
        f32("value_scale"),
    ],
};

pub static SAMPLE: KernelFile = KernelFile {
    name: "sample.cu",
    source: include_str!("kernels/sample.cu"),
    macros: &[],
    // The weights of the tokens have to be those of the CPU's sampler to the bit, which rounds each
    // product and sum by itself.
    options: &["--fmad=false"],
    entries: &[&SAMPLE_ROWS],
};

pub static SAMPLE_ROWS: Entry = Entry {
    name: "sample_rows",
    parameters: &[
        pointer("chosen"),
        pointer("statuses"),
        pointer("logprobs"),
        pointer("logits"),
        pointer("scratch"),
        pointer("draws"),
        pointer("changes"),
        u32("vocabulary"),
        u32("logits_stride"),
    ],
};

pub static FP8: KernelFile = KernelFile {
    name: "fp8.cu",
    source: include_str!("kernels/fp8.cu"),
    macros: &["ELEMENT"],
    options: &[],
    entries: &[&QUANTISE_ROWS, &SCALE_PRODUCT],
};

pub static QUANTISE_ROWS: Entry = Entry {
    name: "quantise_rows",
    parameters: &[pointer("out"), pointer("scales"), pointer("x"), u32("width")],
};

pub static SCALE_PRODUCT: Entry = Entry {
    name: "scale_product",
    parameters: &[
        pointer("out"),
        pointer("product"),
        pointer("row_scales"),
        pointer("column_scales"),
        pointer("bias"),
        u32("columns"),
    ],
};

/// All kernel files.
pub static FILES: [&KernelFile; 8] = [&ROWS, &NORM, &ROPE, &SILU, &DECODE, &PREFILL, &SAMPLE, &FP8];

#[cfg(test)]
mod tests {
    use super::*;

    /// The names of a kernel's parameters as its source declares them.
    fn declared(source: &str, kernel: &str) -> Vec<String> {
        let start = source.find(&format!(" {kernel}(\n")).unwrap_or_else(|| panic!("no {kernel}"));
        let code = |line: &str| line.split("//").next().unwrap_or_default().to_owned();
        let head: String = source[start..].lines().skip(1).map(code).collect();
        let list = head.split(')').next().unwrap_or_default();
        let name = |parameter: &str| {
            let end =
                parameter.rsplit(|c: char| !c.is_alphanumeric() && c != '_').find(|word| !word.is_empty());
            end.unwrap_or_default().to_owned()
        };
        list.split(',').map(name).collect()
    }

    #[test]
    fn the_tables_name_the_parameters_of_the_sources() {
        for file in FILES {
            for entry in file.entries {
                let names: Vec<_> = entry.parameters.iter().map(|parameter| parameter.name).collect();
                assert_eq!(declared(file.source, entry.name), names, "{} in {}", entry.name, file.name);
            }
        }
    }

    #[test]
    fn sources_include_nothing() {
        for text in FILES.map(|file| file.source).into_iter().chain([PTX_HEADER, COMMON_HEADER]) {
            assert!(!text.contains("#include"), "{}", &text[..60]);
        }
    }

    #[test]
    #[should_panic(expected = "macros of norm.cu")]
    fn a_forgotten_macro_is_found() {
        let _ = Module::new(&NORM, vec![("ELEMENT", 1)]);
    }
}
