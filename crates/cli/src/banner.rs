//! What is said once the model is loaded.

use std::net::SocketAddr;

use crate::load::Summary;
use crate::size::ByteSize;

/// The model, what fits, and a line to paste.
pub fn lines(summary: &Summary, name: &str, address: SocketAddr, has_keys: bool) -> Vec<String> {
    let engine = &summary.engine;
    let tokens = u64::from(engine.num_blocks) * u64::from(engine.block_size);
    vec![
        format!("servelab {} serves {name} on http://{address}", env!("CARGO_PKG_VERSION")),
        format!(
            "  model     {}, {} parameters, {} in {}",
            summary.architecture,
            count(summary.parameters),
            ByteSize(summary.weight_bytes),
            summary.weight_dtype
        ),
        format!("  device    {}", summary.device),
        format!(
            "  KV cache  {} blocks of {} tokens hold {tokens} tokens, {} in {}; prefix cache {}",
            engine.num_blocks,
            engine.block_size,
            ByteSize(summary.kv_cache_bytes),
            summary.kv_dtype,
            if engine.prefix_cache { "on" } else { "off" }
        ),
        format!(
            "  limits    {} tokens a sequence, {} sequences at once, {} tokens a step",
            engine.max_model_len, engine.max_running, engine.max_batched_tokens
        ),
        format!("  try       {}", curl(summary, name, address, has_keys)),
    ]
}

fn curl(summary: &Summary, name: &str, address: SocketAddr, has_keys: bool) -> String {
    let key = if has_keys { " -H \"authorization: Bearer $API_KEY\"" } else { "" };
    let name = serde_json::Value::from(name).to_string().replace('\'', "'\\''");
    let (path, question) = if summary.has_chat_template {
        ("chat/completions", r#""messages": [{"role": "user", "content": "What is continuous batching?"}]"#)
    } else {
        ("completions", r#""prompt": "Continuous batching is""#)
    };
    format!(
        "curl -s http://{address}/v1/{path}{key} -H 'content-type: application/json' \
         -d '{{\"model\": {name}, \"temperature\": 0, {question}}}'"
    )
}

/// `135 M` and the like.
fn count(number: u64) -> String {
    match number {
        0..1_000 => number.to_string(),
        1_000..1_000_000 => format!("{:.1} thousand", number as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} million", number as f64 / 1e6),
        _ => format!("{:.2} billion", number as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(has_chat_template: bool) -> Summary {
        Summary {
            device: "cpu".to_owned(),
            architecture: "LlamaForCausalLM",
            parameters: 3_100_000,
            weight_dtype: "bf16",
            weight_bytes: 6_200_000,
            kv_dtype: "f32",
            kv_cache_bytes: 64 << 20,
            engine: servelab_engine::EngineConfig {
                block_size: 16,
                num_blocks: 2048,
                max_model_len: 512,
                max_batched_tokens: 512,
                max_running: 64,
                max_waiting: 512,
                prefix_cache: true,
            },
            has_chat_template,
        }
    }

    #[test]
    fn the_banner_is_as_reviewed() {
        let text = lines(&summary(true), "demo", ([127, 0, 0, 1], 8000).into(), false).join("\n");
        insta::assert_snapshot!(text);
    }

    #[test]
    fn the_line_to_paste_survives_a_shell() {
        let line = lines(&summary(false), "it's", ([127, 0, 0, 1], 1).into(), true).pop().unwrap();
        assert!(line.contains(r#""model": "it'\''s""#), "{line}");
        assert!(line.contains("/v1/completions") && line.contains("Bearer $API_KEY"), "{line}");
    }
}
