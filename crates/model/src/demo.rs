//! The model that is part of the binary: trained by this repository on its own handbook.

use crate::checkpoint::WeightFiles;
use crate::source::TextFiles;

/// config.json of the demo model.
pub const CONFIG: &[u8] = include_bytes!("../demo/config.json");

const WEIGHTS: &[u8] = include_bytes!("../demo/model.safetensors");

/// The weights of the demo model.
pub fn weights() -> WeightFiles {
    WeightFiles::Embedded(WEIGHTS)
}

/// Tokenizer, chat template and generation settings of the demo model.
pub fn text_files() -> TextFiles {
    TextFiles {
        tokenizer: Some(include_bytes!("../demo/tokenizer.json").to_vec()),
        tokenizer_config: Some(include_bytes!("../demo/tokenizer_config.json").to_vec()),
        chat_template: Some(include_str!("../demo/chat_template.jinja").to_owned()),
        generation_config: Some(include_bytes!("../demo/generation_config.json").to_vec()),
    }
}
