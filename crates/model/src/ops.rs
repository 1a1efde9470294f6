//! The operations that a step of the decoder is made of. A device implements them once and runs
//! every model of the family; the CPU is the first.
//!
//! Activations are matrices of `rows x width` in a buffer that the device owns. All buffers are made
//! when the model is loaded, large enough for the largest step; a step allocates none. `rows` is
//! how many rows of a buffer are filled, and each operation sets it on what it writes.

use servelab_engine::{LogitsRow, RowOutput, RunnerError, Step};

use crate::error::ModelError;
use crate::weights::TensorData;

/// What a device can do. Shapes are given in brackets; T is the number of tokens of the step.
pub trait Ops {
    /// Activations, `[rows, width]`.
    type Buffer;
    /// A weight matrix `[outputs, inputs]` with or without a bias, in the device's own layout.
    type Matrix;
    /// The weight of a norm, `[width]`.
    type Vector;

    /// Takes over a weight matrix made of `parts`, whose rows follow one another: query, key and
    /// value, or gate and up. They are one product then. `bias` is `[outputs]`.
    ///
    /// # Errors
    /// If the device has no memory left.
    fn matrix(
        &mut self,
        parts: Vec<TensorData<'_>>,
        bias: Option<Vec<f32>>,
    ) -> Result<Self::Matrix, ModelError>;

    /// Takes over the weight of a norm.
    ///
    /// # Errors
    /// If the device has no memory left.
    fn vector(&mut self, values: Vec<f32>) -> Result<Self::Vector, ModelError>;

    /// A buffer for up to `rows` rows.
    ///
    /// # Errors
    /// If the device has no memory left.
    fn buffer(&mut self, rows: usize, width: usize) -> Result<Self::Buffer, ModelError>;

    /// Starts a step: copies the blocks it wants copied and makes positions, slots and block tables
    /// known to the operations below.
    ///
    /// # Errors
    /// [`RunnerError::Step`] if the step does not fit the device's buffers or names a block or token
    /// that does not exist.
    fn begin(&mut self, step: &Step) -> Result<(), RunnerError>;

    /// `out [T, hidden]`: the rows of `table` that the step's tokens name.
    fn embed(&mut self, table: &Self::Matrix, step: &Step, out: &mut Self::Buffer);

    /// `out = x / rms(x) * weight`, row by row. (Zhang and Sennrich 2019)
    fn rms_norm(&mut self, x: &Self::Buffer, weight: &Self::Vector, eps: f32, out: &mut Self::Buffer);

    /// `x += delta`, then as [`Ops::rms_norm`].
    fn add_rms_norm(
        &mut self,
        x: &mut Self::Buffer,
        delta: &Self::Buffer,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Buffer,
    );

    /// `out [rows, outputs] = x [rows, inputs] * matrix^T + bias`.
    fn linear(&mut self, matrix: &Self::Matrix, x: &Self::Buffer, out: &mut Self::Buffer);

    /// For each row of `qkv [T, (heads + 2 * kv_heads) * head_dim]`: the norm of each query and key
    /// head where `norms` (query, key) are given, the rotation of queries and keys to the token's
    /// position, queries into `queries [T, heads * head_dim]`, keys and values into the token's slot
    /// of the layer's cache.
    fn rope_and_cache(
        &mut self,
        layer: usize,
        qkv: &Self::Buffer,
        norms: Option<(&Self::Vector, &Self::Vector)>,
        eps: f32,
        queries: &mut Self::Buffer,
    );

    /// `out [T, heads * head_dim]`: causal attention of `queries` to the cached keys and values of
    /// their own sequence, found through its block table; at most to the latest `window`.
    fn attention(
        &mut self,
        layer: usize,
        window: Option<usize>,
        step: &Step,
        queries: &Self::Buffer,
        out: &mut Self::Buffer,
    );

    /// `out [T, inner] = silu(gate) * up` of `gate_up [T, 2 * inner]`.
    fn silu_mul(&mut self, gate_up: &Self::Buffer, out: &mut Self::Buffer);

    /// `out [rows.len(), width]`: the given rows of `x`.
    fn gather_rows(&mut self, x: &Self::Buffer, rows: &[usize], out: &mut Self::Buffer);

    /// Answers each of `wants` (a row of `logits` and what is wanted of it), in order.
    ///
    /// # Errors
    /// [`RunnerError::Step`] if a row holds no usable number.
    fn sample(
        &mut self,
        logits: &Self::Buffer,
        wants: &[(usize, &LogitsRow)],
        out: &mut Vec<RowOutput>,
    ) -> Result<(), RunnerError>;
}
