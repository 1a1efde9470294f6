//! Random weights in the shape of a model, so that its speed can be measured without a download.

use std::borrow::Cow;
use std::path::Path;

use half::bf16;
use safetensors::{Dtype, View};

use crate::config::{ModelConfig, WeightDtype};
use crate::error::ModelError;
use crate::weights::{TensorData, expected_tensors};

/// Half the width of the uniform distribution of matrix entries; its standard deviation is 0.02,
/// at which these families are initialised for training.
const HALF_WIDTH: f32 = 0.034_641;

/// Numbers drawn from a seed. Each depends only on the seed, the tensor's name and its own index,
/// so that tensors can be made in any order and by any number of threads.
#[derive(Clone, Copy, Debug)]
pub struct DummyWeights {
    pub seed: u64,
}

impl DummyWeights {
    /// A bf16 tensor: norms are one, biases and matrices uniform with standard deviation 0.02.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> TensorData<'static> {
        let elements = shape.iter().product::<usize>();
        let bytes = if name.ends_with("norm.weight") {
            bf16::ONE.to_le_bytes().repeat(elements)
        } else {
            self.uniform(name, elements)
        };
        TensorData { dtype: WeightDtype::BF16, shape: shape.to_vec(), bytes: Cow::Owned(bytes) }
    }

    fn uniform(&self, name: &str, elements: usize) -> Vec<u8> {
        let key = name.bytes().fold(mix(self.seed), |key, byte| mix(key ^ u64::from(byte)));
        let mut bytes = vec![0; elements * 2];
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        // Whole groups of four numbers (eight bytes) per thread, since one draw gives four.
        let share = elements.div_ceil(threads).next_multiple_of(4).max(1 << 14);
        std::thread::scope(|scope| {
            for (part, bytes) in bytes.chunks_mut(share * 2).enumerate() {
                scope.spawn(move || fill(key, (part * share / 4) as u64, bytes));
            }
        });
        bytes
    }
}

/// Fills `bytes` with bf16 numbers, four from each value of the counter.
fn fill(key: u64, first: u64, bytes: &mut [u8]) {
    for (counter, group) in (first..).zip(bytes.chunks_mut(8)) {
        let bits = mix(key.wrapping_add(counter.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        for (lane, number) in group.chunks_exact_mut(2).enumerate() {
            let sixteen = (bits >> (16 * lane)) as u16 as i16;
            let value = f32::from(sixteen) * (HALF_WIDTH / 32768.0);
            number.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
        }
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A tensor of a file being written: its numbers are made when they are asked for.
struct Lazy<'a> {
    weights: DummyWeights,
    name: &'a str,
    shape: &'a [usize],
}

impl View for Lazy<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }
    fn shape(&self) -> &[usize] {
        self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        self.weights.tensor(self.name, self.shape).bytes
    }
    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * 2
    }
}

/// Writes the dummy weights as a checkpoint folder (config.json and model.safetensors), so that
/// other programs can run the same model. Needs no more memory than the largest tensor.
///
/// # Errors
/// [`ModelError::Io`] or [`ModelError::Safetensors`] if a file cannot be written.
pub fn write_checkpoint(
    folder: &Path,
    config_json: &[u8],
    config: &ModelConfig,
    seed: u64,
) -> Result<(), ModelError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| ModelError::Io { path, source }
    };
    std::fs::create_dir_all(folder).map_err(io(folder))?;
    let path = folder.join("config.json");
    std::fs::write(&path, config_json).map_err(io(&path))?;
    let specs = expected_tensors(config);
    let weights = DummyWeights { seed };
    let views = specs.iter().map(|s| (s.name.as_str(), Lazy { weights, name: &s.name, shape: &s.shape }));
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let path = folder.join("model.safetensors");
    safetensors::serialize_to_file(views, Some(metadata), &path)
        .map_err(|e| ModelError::Safetensors { file: path.display().to_string(), reason: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_depend_on_seed_and_name_and_have_the_deviation_of_an_initialisation() {
        let tensor = |seed, name| DummyWeights { seed }.tensor(name, &[300, 700]).to_f32();
        let a = tensor(1, "a.weight");
        assert_eq!(a, tensor(1, "a.weight"));
        assert_ne!(a, tensor(2, "a.weight"));
        assert_ne!(a, tensor(1, "b.weight"));
        let mean = a.iter().sum::<f32>() / a.len() as f32;
        let variance = a.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / a.len() as f32;
        assert!(mean.abs() < 2e-4, "{mean}");
        assert!((variance.sqrt() - 0.02).abs() < 2e-4, "{}", variance.sqrt());
    }

    #[test]
    fn parts_made_by_several_threads_are_the_numbers_made_by_one() {
        let name = "model.layers.0.mlp.up_proj.weight";
        let many = DummyWeights { seed: 7 }.tensor(name, &[401, 503]);
        let key = name.bytes().fold(mix(7), |key, byte| mix(key ^ u64::from(byte)));
        let mut one = vec![0; 401 * 503 * 2];
        fill(key, 0, &mut one);
        assert_eq!(many.bytes, one);
    }
}
