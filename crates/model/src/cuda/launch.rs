//! The kernels of one model, loaded, each with a function that checks the sizes of what it is given and
//! launches it.
//!
//! What a kernel reads from device memory to find its way (token ids, slots, block tables, items) is not
//! checked here: whoever uploads it has to.
#![allow(unsafe_code)]

use super::draws::{ChangeWords, DrawWords, LOGPROB_WORDS};
use super::geometry::{self, DecodeItem, DecodeWorkspace, PrefillItem};
use super::gpu::{Argument, Gpu, GpuError, Launch, Span};
use super::kernels::{self, Entry, Specialisation};

/// All kernels of a model on a GPU.
pub struct Kernels<G: Gpu> {
    specialisation: Specialisation,
    decode_launch: Launch,
    embed: G::Kernel,
    gather_rows: G::Kernel,
    copy_blocks: G::Kernel,
    rms_norm: G::Kernel,
    add_rms_norm: G::Kernel,
    rope_and_cache: G::Kernel,
    silu_mul: G::Kernel,
    decode_attention: G::Kernel,
    prefill_attention: G::Kernel,
    sample_rows: G::Kernel,
    /// On GPUs with 8-bit floats.
    fp8: Option<Fp8Kernels<G>>,
}

struct Fp8Kernels<G: Gpu> {
    quantise_rows: G::Kernel,
    scale_product: G::Kernel,
}

impl<G: Gpu> Kernels<G> {
    /// Compiles and loads them.
    ///
    /// # Errors
    /// [`GpuError::Refused`] if the GPU or the shape is not supported; [`GpuError::Compile`].
    pub fn load(gpu: &G, specialisation: Specialisation) -> Result<Self, GpuError> {
        specialisation.check(gpu.info())?;
        let s = &specialisation;
        let one = |module: &kernels::Module, entry: &'static Entry, shared_bytes: u32| {
            gpu.kernel(&gpu.load(module)?, entry, shared_bytes)
        };
        let (rows, norm, fp8) = (gpu.load(&s.rows())?, gpu.load(&s.norm())?, s.fp8());
        let decode_launch = geometry::decode_launch(gpu.info(), s);
        let prefill_bytes = s.prefill.shared_bytes(s.head_dim, s.kv);
        let fp8 = match gpu.info().arch.has_fp8() {
            false => None,
            true => Some(Fp8Kernels {
                quantise_rows: one(&fp8, &kernels::QUANTISE_ROWS, 0)?,
                scale_product: one(&fp8, &kernels::SCALE_PRODUCT, 0)?,
            }),
        };
        Ok(Self {
            embed: gpu.kernel(&rows, &kernels::EMBED, 0)?,
            gather_rows: gpu.kernel(&rows, &kernels::GATHER_ROWS, 0)?,
            copy_blocks: gpu.kernel(&rows, &kernels::COPY_BLOCKS, 0)?,
            rms_norm: gpu.kernel(&norm, &kernels::RMS_NORM, 0)?,
            add_rms_norm: gpu.kernel(&norm, &kernels::ADD_RMS_NORM, 0)?,
            rope_and_cache: one(&s.rope(), &kernels::ROPE_AND_CACHE, 0)?,
            silu_mul: one(&s.silu(), &kernels::SILU_MUL, 0)?,
            decode_attention: one(&s.decode(), &kernels::DECODE_ATTENTION, decode_launch.shared_bytes)?,
            prefill_attention: one(&s.prefill(), &kernels::PREFILL_ATTENTION, prefill_bytes)?,
            sample_rows: one(&s.sample(), &kernels::SAMPLE_ROWS, 0)?,
            fp8,
            decode_launch,
            specialisation,
        })
    }

    pub fn specialisation(&self) -> &Specialisation {
        &self.specialisation
    }

    /// `out [rows, width]` = the rows of `table` that `tokens` name; see `kernels/rows.cu`.
    ///
    /// # Errors
    /// As [`Gpu::launch`]; so for all that follow.
    pub fn embed(&self, gpu: &G, stream: &G::Stream, call: Embed<'_>) -> Result<(), GpuError> {
        let Embed { rows, width, .. } = call;
        Needs("embed").of("out", call.out, rows * width * 2)?.of("tokens", call.tokens, rows * 4)?;
        let arguments = [
            Argument::Memory(call.out),
            Argument::Memory(call.table),
            Argument::Memory(call.tokens),
            Argument::Memory(call.chosen),
            vectors(width),
        ];
        put(gpu, stream, &self.embed, geometry::rows_launch(rows as u32), &arguments)
    }

    /// `out [rows, width]` = the rows of `x` that `indices` name; see `kernels/rows.cu`.
    ///
    /// # Errors
    /// As [`Kernels::embed`].
    pub fn gather_rows(&self, gpu: &G, stream: &G::Stream, call: GatherRows<'_>) -> Result<(), GpuError> {
        let GatherRows { rows, width, .. } = call;
        Needs("gather_rows").of("out", call.out, rows * width * 2)?.of("indices", call.indices, rows * 4)?;
        let arguments = [
            Argument::Memory(call.out),
            Argument::Memory(call.x),
            Argument::Memory(call.indices),
            vectors(width),
        ];
        put(gpu, stream, &self.gather_rows, geometry::rows_launch(rows as u32), &arguments)
    }

    /// Copies `count` blocks in each layer of the cache; `copies` is `[count, 2]`: from, to.
    ///
    /// # Errors
    /// As [`Kernels::embed`].
    pub fn copy_blocks(&self, gpu: &G, stream: &G::Stream, call: CopyBlocks<'_>) -> Result<(), GpuError> {
        let CopyBlocks { count, layers, layer_bytes, block_bytes, .. } = call;
        Needs("copy_blocks").of("cache", call.cache, layers * layer_bytes)?.of(
            "copies",
            call.copies,
            count * 8,
        )?;
        let arguments = [
            Argument::Memory(call.cache),
            Argument::Memory(call.copies),
            Argument::U32((block_bytes / 16) as u32),
            Argument::U64((layer_bytes / 16) as u64),
        ];
        let launch = geometry::copy_blocks_launch(count as u32, layers as u32, block_bytes as u64);
        put(gpu, stream, &self.copy_blocks, launch, &arguments)
    }

    /// `out [rows, hidden] = x / rms(x) * weight`, with `weight [hidden]` in f32.
    ///
    /// # Errors
    /// As [`Kernels::embed`].
    pub fn rms_norm(&self, gpu: &G, stream: &G::Stream, call: RmsNorm<'_>) -> Result<(), GpuError> {
        let bytes = call.rows * self.specialisation.hidden as usize * 2;
        Needs("rms_norm").of("out", call.out, bytes)?.of("x", call.x, bytes)?;
        let arguments = [
            Argument::Memory(call.out),
            Argument::Memory(call.x),
            Argument::Memory(call.weight),
            Argument::F32(call.eps),
        ];
        let launch = geometry::norm_launch(call.rows as u32, self.specialisation.hidden);
        put(gpu, stream, &self.rms_norm, launch, &arguments)
    }

    /// `x += delta`, then as [`Kernels::rms_norm`].
    ///
    /// # Errors
    /// As [`Kernels::embed`].
    pub fn add_rms_norm(
        &self,
        gpu: &G,
        stream: &G::Stream,
        delta: Span<'_>,
        call: RmsNorm<'_>,
    ) -> Result<(), GpuError> {
        let bytes = call.rows * self.specialisation.hidden as usize * 2;
        Needs("add_rms_norm")
            .of("out", call.out, bytes)?
            .of("x", call.x, bytes)?
            .of("delta", delta, bytes)?;
        let arguments = [
            Argument::Memory(call.out),
            Argument::Memory(call.x),
            Argument::Memory(delta),
            Argument::Memory(call.weight),
            Argument::F32(call.eps),
        ];
        let launch = geometry::norm_launch(call.rows as u32, self.specialisation.hidden);
        put(gpu, stream, &self.add_rms_norm, launch, &arguments)
    }

    /// Norms and rotates queries and keys, and writes keys and values to the cache; see `kernels/rope.cu`.
    ///
    /// # Errors
    /// As [`Kernels::embed`].
    pub fn rope_and_cache(
        &self,
        gpu: &G,
        stream: &G::Stream,
        call: RopeAndCache<'_>,
    ) -> Result<(), GpuError> {
        let RopeAndCache { tokens, kv_heads, .. } = call;
        let (head_dim, heads) = (self.specialisation.head_dim as usize, self.heads(kv_heads));
        Needs("rope_and_cache")
            .of("queries", call.queries, tokens * heads * head_dim * 2)?
            .of("qkv", call.qkv, tokens * (heads + 2 * kv_heads) * head_dim * 2)?
            .of("positions", call.positions, tokens * 4)?
            .of("slots", call.slots, tokens * 4)?
            .of("frequencies", call.frequencies, head_dim / 2 * 4)?;
        let norms = call.norms.unwrap_or((Span::NONE, Span::NONE));
        if self.specialisation.head_norms != call.norms.is_some() {
            let reason = "norms of heads, as the kernels were compiled for".to_owned();
            return Err(GpuError::Refused { what: "rope_and_cache".to_owned(), reason });
        }
        let arguments = [
            Argument::Memory(call.queries),
            Argument::Memory(call.cache),
            Argument::Memory(call.qkv),
            Argument::Memory(call.positions),
            Argument::Memory(call.slots),
            Argument::Memory(call.frequencies),
            Argument::Memory(norms.0),
            Argument::Memory(norms.1),
            Argument::U32(heads as u32),
            Argument::U32(kv_heads as u32),
            Argument::F32(call.amplitude),
            Argument::F32(call.eps),
            Argument::F32(call.scales.key),
            Argument::F32(call.scales.value),
        ];
        let launch = geometry::rope_launch(tokens as u32, heads as u32, kv_heads as u32);
        put(gpu, stream, &self.rope_and_cache, launch, &arguments)
    }

    /// `out [rows, inner] = silu(gate) * up` of `gate_up [rows, 2, inner]`.
    ///
    /// # Errors
    /// As [`Kernels::embed`].
    pub fn silu_mul(
        &self,
        gpu: &G,
        stream: &G::Stream,
        gate_up: Span<'_>,
        out: Span<'_>,
        rows: usize,
        inner: usize,
    ) -> Result<(), GpuError> {
        Needs("silu_mul").of("gate_up", gate_up, rows * inner * 4)?.of("out", out, rows * inner * 2)?;
        let arguments = [Argument::Memory(out), Argument::Memory(gate_up), Argument::U32(inner as u32)];
        put(gpu, stream, &self.silu_mul, geometry::silu_launch(rows as u32, inner as u32), &arguments)
    }

    /// Attention of single tokens; the items are those of [`geometry::plan_decode`]. The launch is the same
    /// for every batch.
    ///
    /// # Errors
    /// As [`Kernels::embed`].
    pub fn decode_attention(
        &self,
        gpu: &G,
        stream: &G::Stream,
        call: DecodeCall<'_>,
    ) -> Result<(), GpuError> {
        let Attention { rows, kv_heads, .. } = call.attention;
        let capacity = call.items.bytes() / size_of::<DecodeItem>();
        let sizes = DecodeWorkspace::new(&self.specialisation, kv_heads as u32, rows, capacity);
        self.attention_needs("decode_attention", &call.attention)?
            .of("item_count", call.item_count, 4)?
            .of("partial_values", call.partial_values, sizes.partial_values)?
            .of("partial_sums", call.partial_sums, sizes.partial_sums)?
            .of("arrivals", call.arrivals, sizes.arrivals)?;
        let arguments = [
            Argument::Memory(call.attention.out),
            Argument::Memory(call.attention.queries),
            Argument::Memory(call.attention.cache),
            Argument::Memory(call.items),
            Argument::Memory(call.item_count),
            Argument::Memory(call.attention.block_tables),
            Argument::Memory(call.partial_values),
            Argument::Memory(call.partial_sums),
            Argument::Memory(call.arrivals),
            Argument::U32(call.attention.table_width as u32),
            Argument::U32(kv_heads as u32),
            Argument::F32(call.attention.scale),
            Argument::F32(call.attention.scales.key),
            Argument::F32(call.attention.scales.value),
        ];
        put(gpu, stream, &self.decode_attention, self.decode_launch, &arguments)
    }

    /// Attention of prompt chunks; the items are those of [`geometry::plan_prefill`].
    ///
    /// # Errors
    /// As [`Kernels::embed`].
    pub fn prefill_attention(
        &self,
        gpu: &G,
        stream: &G::Stream,
        call: PrefillCall<'_>,
    ) -> Result<(), GpuError> {
        let kv_heads = call.attention.kv_heads;
        self.attention_needs("prefill_attention", &call.attention)?.of(
            "items",
            call.items,
            call.item_count * size_of::<PrefillItem>(),
        )?;
        let arguments = [
            Argument::Memory(call.attention.out),
            Argument::Memory(call.attention.queries),
            Argument::Memory(call.attention.cache),
            Argument::Memory(call.items),
            Argument::Memory(call.attention.block_tables),
            Argument::U32(call.attention.table_width as u32),
            Argument::U32(kv_heads as u32),
            Argument::U32(call.window.unwrap_or(0)),
            Argument::F32(call.attention.scale),
            Argument::F32(call.attention.scales.key),
            Argument::F32(call.attention.scales.value),
        ];
        let launch = geometry::prefill_launch(call.item_count as u32, kv_heads as u32, &self.specialisation);
        put(gpu, stream, &self.prefill_attention, launch, &arguments)
    }

    fn attention_needs(&self, kernel: &'static str, attention: &Attention<'_>) -> Result<Needs, GpuError> {
        let width = self.heads(attention.kv_heads) * self.specialisation.head_dim as usize;
        let bytes = attention.rows * width * 2;
        Needs(kernel).of("queries", attention.queries, bytes)?.of("out", attention.out, bytes)
    }

    fn heads(&self, kv_heads: usize) -> usize {
        kv_heads * self.specialisation.group as usize
    }

    /// Answers draws and scores; see `kernels/sample.cu`.
    ///
    /// # Errors
    /// As [`Kernels::embed`].
    pub fn sample(&self, gpu: &G, stream: &G::Stream, call: Sample<'_>) -> Result<(), GpuError> {
        let answers = call.answers;
        Needs("sample_rows")
            .of("chosen", call.chosen, answers * 4)?
            .of("statuses", call.statuses, answers * 4)?
            .of("logprobs", call.logprobs, if call.any_logprobs { answers * LOGPROB_WORDS * 4 } else { 0 })?
            .of("logits", call.logits, call.rows * call.logits_stride * 4)?
            .of("scratch", call.scratch, call.scratch_rows * call.vocabulary * 4)?
            .of("draws", call.draws, answers * size_of::<DrawWords>())?
            .of("changes", call.changes, call.change_count * size_of::<ChangeWords>())?;
        let arguments = [
            Argument::Memory(call.chosen),
            Argument::Memory(call.statuses),
            Argument::Memory(call.logprobs),
            Argument::Memory(call.logits),
            Argument::Memory(call.scratch),
            Argument::Memory(call.draws),
            Argument::Memory(call.changes),
            Argument::U32(call.vocabulary as u32),
            Argument::U32(call.logits_stride as u32),
        ];
        put(gpu, stream, &self.sample_rows, geometry::sample_launch(answers as u32), &arguments)
    }

    /// `out [rows, width]` in e4m3 and `scales [rows]` in f32 of `x [rows, width]`: `x = out * scale`.
    ///
    /// # Errors
    /// As [`Kernels::embed`], and on a GPU without 8-bit floats.
    pub fn quantise_rows(&self, gpu: &G, stream: &G::Stream, call: QuantiseRows<'_>) -> Result<(), GpuError> {
        let QuantiseRows { rows, width, .. } = call;
        Needs("quantise_rows").of("out", call.out, rows * width)?.of("scales", call.scales, rows * 4)?.of(
            "x",
            call.x,
            rows * width * 2,
        )?;
        let arguments = [
            Argument::Memory(call.out),
            Argument::Memory(call.scales),
            Argument::Memory(call.x),
            Argument::U32(width as u32),
        ];
        let kernel = &self.fp8(gpu)?.quantise_rows;
        put(gpu, stream, kernel, geometry::quantise_launch(rows as u32), &arguments)
    }

    /// `out [rows, columns] = product * row_scale * column_scale + bias`.
    ///
    /// # Errors
    /// As [`Kernels::quantise_rows`].
    pub fn scale_product(&self, gpu: &G, stream: &G::Stream, call: ScaleProduct<'_>) -> Result<(), GpuError> {
        let ScaleProduct { rows, columns, .. } = call;
        Needs("scale_product")
            .of("out", call.out, rows * columns * 2)?
            .of("product", call.product, rows * columns * 4)?
            .of("row_scales", call.row_scales, rows * 4)?
            .of("column_scales", call.column_scales, columns * 4)?
            .of("bias", call.bias, if call.bias == Span::NONE { 0 } else { columns * 2 })?;
        let arguments = [
            Argument::Memory(call.out),
            Argument::Memory(call.product),
            Argument::Memory(call.row_scales),
            Argument::Memory(call.column_scales),
            Argument::Memory(call.bias),
            Argument::U32(columns as u32),
        ];
        let kernel = &self.fp8(gpu)?.scale_product;
        put(gpu, stream, kernel, geometry::scale_product_launch(rows as u32, columns as u32), &arguments)
    }

    fn fp8(&self, gpu: &G) -> Result<&Fp8Kernels<G>, GpuError> {
        self.fp8.as_ref().ok_or_else(|| GpuError::Refused {
            what: "8-bit floats".to_owned(),
            reason: format!("compute capability {}; they need 8.9 or later", gpu.info().arch),
        })
    }
}

fn put<G: Gpu>(
    gpu: &G,
    stream: &G::Stream,
    kernel: &G::Kernel,
    launch: Launch,
    arguments: &[Argument<'_>],
) -> Result<(), GpuError> {
    // SAFETY: sizes were checked by the callers; the rest is what the module asks of its users. The memory is
    // device memory, and freeing it waits for the stream.
    unsafe { gpu.launch(stream, kernel, launch, arguments) }
}

/// Rows of 16-bit numbers in 16-byte units.
fn vectors(width: usize) -> Argument<'static> {
    Argument::U32((width / 8) as u32)
}

/// A kernel whose memory is being checked.
#[derive(Clone, Copy)]
struct Needs(&'static str);

impl Needs {
    fn of(self, name: &str, span: Span<'_>, bytes: usize) -> Result<Self, GpuError> {
        if span.bytes() >= bytes {
            return Ok(self);
        }
        let reason = format!("{name} has {} bytes, not {bytes}", span.bytes());
        Err(GpuError::Refused { what: self.0.to_owned(), reason })
    }
}

/// What cached keys and values are multiplied by; 1 for 16-bit caches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KvScales {
    pub key: f32,
    pub value: f32,
}

impl Default for KvScales {
    fn default() -> Self {
        Self { key: 1.0, value: 1.0 }
    }
}

/// See [`Kernels::embed`].
#[derive(Clone, Copy, Debug)]
pub struct Embed<'a> {
    /// `[rows, width]`
    pub out: Span<'a>,
    /// `[vocabulary, width]`
    pub table: Span<'a>,
    /// `[rows]`; with the top bit set, an index into `chosen`.
    pub tokens: Span<'a>,
    /// `[answers]` of the last step; [`Span::NONE`] if no token refers to it.
    pub chosen: Span<'a>,
    pub rows: usize,
    pub width: usize,
}

/// See [`Kernels::gather_rows`].
#[derive(Clone, Copy, Debug)]
pub struct GatherRows<'a> {
    /// `[rows, width]`
    pub out: Span<'a>,
    /// `[any, width]`
    pub x: Span<'a>,
    /// `[rows]`
    pub indices: Span<'a>,
    pub rows: usize,
    pub width: usize,
}

/// See [`Kernels::copy_blocks`].
#[derive(Clone, Copy, Debug)]
pub struct CopyBlocks<'a> {
    /// `[layers, blocks, block]`
    pub cache: Span<'a>,
    /// `[count, 2]`
    pub copies: Span<'a>,
    pub count: usize,
    pub layers: usize,
    pub layer_bytes: usize,
    /// Keys and values of one block in one layer.
    pub block_bytes: usize,
}

/// See [`Kernels::rms_norm`].
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm<'a> {
    /// `[rows, hidden]`
    pub out: Span<'a>,
    /// `[rows, hidden]`
    pub x: Span<'a>,
    /// `[hidden]`, f32
    pub weight: Span<'a>,
    pub rows: usize,
    pub eps: f32,
}

/// See [`Kernels::rope_and_cache`].
#[derive(Clone, Copy, Debug)]
pub struct RopeAndCache<'a> {
    /// `[tokens, heads, head_dim]`
    pub queries: Span<'a>,
    /// Of one layer, `[blocks, 2, kv_heads, block_size, head_dim]`
    pub cache: Span<'a>,
    /// `[tokens, heads + 2 * kv_heads, head_dim]`
    pub qkv: Span<'a>,
    /// `[tokens]`
    pub positions: Span<'a>,
    /// `[tokens]`; `u32::MAX` where the row is padding.
    pub slots: Span<'a>,
    /// `[head_dim / 2]`, f32
    pub frequencies: Span<'a>,
    /// Of queries and keys, each `[head_dim]`, f32
    pub norms: Option<(Span<'a>, Span<'a>)>,
    pub tokens: usize,
    pub kv_heads: usize,
    /// Multiplies sines and cosines.
    pub amplitude: f32,
    pub eps: f32,
    pub scales: KvScales,
}

/// What both attention kernels take.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// `[rows, heads, head_dim]`
    pub out: Span<'a>,
    /// `[rows, heads, head_dim]`
    pub queries: Span<'a>,
    /// Of one layer, `[blocks, 2, kv_heads, block_size, head_dim]`
    pub cache: Span<'a>,
    /// `[tables, table_width]`: block numbers
    pub block_tables: Span<'a>,
    pub table_width: usize,
    /// Rows of queries and output.
    pub rows: usize,
    pub kv_heads: usize,
    /// Multiplies the scores; usually 1 / sqrt(head_dim).
    pub scale: f32,
    pub scales: KvScales,
}

/// See [`Kernels::decode_attention`].
#[derive(Clone, Copy, Debug)]
pub struct DecodeCall<'a> {
    pub attention: Attention<'a>,
    /// `[capacity]` of [`DecodeItem`]
    pub items: Span<'a>,
    /// `[1]`: how many of them are to be done.
    pub item_count: Span<'a>,
    /// Workspaces; see [`DecodeWorkspace`].
    pub partial_values: Span<'a>,
    pub partial_sums: Span<'a>,
    pub arrivals: Span<'a>,
}

/// See [`Kernels::prefill_attention`].
#[derive(Clone, Copy, Debug)]
pub struct PrefillCall<'a> {
    pub attention: Attention<'a>,
    /// `[item_count]` of [`PrefillItem`]
    pub items: Span<'a>,
    pub item_count: usize,
    /// A token sees itself and the tokens before it, that many in all.
    pub window: Option<u32>,
}

/// See [`Kernels::sample`].
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// `[answers]`, u32
    pub chosen: Span<'a>,
    /// `[answers]`, u32; see [`super::draws::read_answer`]
    pub statuses: Span<'a>,
    /// `[answers, LOGPROB_WORDS]`
    pub logprobs: Span<'a>,
    /// `[rows, logits_stride]`, f32
    pub logits: Span<'a>,
    /// `[scratch_rows, vocabulary]`, f32
    pub scratch: Span<'a>,
    /// `[answers]` of [`DrawWords`]
    pub draws: Span<'a>,
    /// `[change_count]` of [`ChangeWords`]
    pub changes: Span<'a>,
    pub answers: usize,
    pub rows: usize,
    pub vocabulary: usize,
    /// At least the vocabulary.
    pub logits_stride: usize,
    pub scratch_rows: usize,
    pub change_count: usize,
    /// Whether any draw wants log-probabilities.
    pub any_logprobs: bool,
}

/// See [`Kernels::quantise_rows`].
#[derive(Clone, Copy, Debug)]
pub struct QuantiseRows<'a> {
    /// `[rows, width]`, e4m3
    pub out: Span<'a>,
    /// `[rows]`, f32
    pub scales: Span<'a>,
    /// `[rows, width]`
    pub x: Span<'a>,
    pub rows: usize,
    pub width: usize,
}

/// See [`Kernels::scale_product`].
#[derive(Clone, Copy, Debug)]
pub struct ScaleProduct<'a> {
    /// `[rows, columns]`
    pub out: Span<'a>,
    /// `[rows, columns]`, f32
    pub product: Span<'a>,
    /// `[rows]`, f32
    pub row_scales: Span<'a>,
    /// `[columns]`, f32
    pub column_scales: Span<'a>,
    /// `[columns]` or [`Span::NONE`]
    pub bias: Span<'a>,
    pub rows: usize,
    pub columns: usize,
}
