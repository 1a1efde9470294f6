//! `GET /v1/models`.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelList {
    pub object: String,
    pub data: Vec<ModelCard>,
}

impl ModelList {
    pub fn new(data: Vec<ModelCard>) -> Self {
        Self { object: "list".into(), data }
    }
}

/// One name under which the model is served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelCard {
    pub id: String,
    pub object: String,
    /// Seconds since the Unix epoch at which the server started.
    pub created: u64,
    pub owned_by: String,
    /// Folder or hub id of the checkpoint.
    pub root: String,
    pub parent: Option<String>,
    /// Longest prompt and answer together, in tokens.
    pub max_model_len: u32,
}
