//! Checkpoints, the decoder, its operations on the CPU, and the sampler. The only home of unsafe code.
