//! Prompts that both sides tokenise, to see whether they agree.

use serde_json::{Value, json};

/// One of them, as the body of `/tokenize`. vLLM has the same route with the same fields.
pub struct Canary {
    pub name: &'static str,
    pub body: Value,
}

/// Whatever has been seen to differ between two tokenizers: the template's system message and turn ends, what stands
/// before a text, runs of spaces, digits, scripts, characters of several code points.
pub fn canaries() -> Vec<Canary> {
    let canary = |name, body| Canary { name, body };
    vec![
        canary(
            "completion",
            json!({"prompt": "The quick brown fox jumps over 12345 lazy dogs.\n\n\tIt's done."}),
        ),
        canary("unicode", json!({"prompt": "Zürich, naïve façade: 東京 λόγος 👩‍👩‍👧 ﬁ ½ \u{a0}end"})),
        canary(
            "chat",
            json!({"messages": [
                {"role": "system", "content": "You answer in few words."},
                {"role": "user", "content": "What is a block? "},
            ]}),
        ),
        canary(
            "later turn",
            json!({"messages": [
                {"role": "user", "content": "What is a block?"},
                {"role": "assistant", "content": "Sixteen tokens."},
                {"role": "user", "content": "And a step? Größe: ½"},
            ]}),
        ),
    ]
}

/// What one side makes of a canary: token ids, or a refusal.
pub type Said = Option<Vec<u32>>;

/// Where the two differ, in words; `None` if they agree. A prompt that both refuse is no difference.
pub fn difference(name: &str, router: &Said, replica: &Said) -> Option<String> {
    match (router, replica) {
        (None, None) => None,
        (Some(_), None) => Some(format!("canary {name:?}: the replica refuses it, the router does not")),
        (None, Some(_)) => Some(format!("canary {name:?}: the router refuses it, the replica does not")),
        (Some(ours), Some(theirs)) => {
            let shared = ours.iter().zip(theirs).take_while(|(one, other)| one == other).count();
            let shown = |ids: &[u32]| ids.get(shared).map_or_else(|| "its end".to_owned(), u32::to_string);
            (ours != theirs).then(|| {
                format!(
                    "canary {name:?}: at token {shared} the router has {} and the replica {}; {} tokens here, {} there",
                    shown(ours),
                    shown(theirs),
                    ours.len(),
                    theirs.len()
                )
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_told_where_it_begins() {
        let some = |ids: &[u32]| Some(ids.to_vec());
        assert_eq!(difference("a", &some(&[1, 2]), &some(&[1, 2])), None);
        assert_eq!(difference("a", &None, &None), None);
        let told = difference("a", &some(&[1, 2, 3]), &some(&[1, 7])).unwrap();
        assert!(
            told.ends_with("at token 1 the router has 2 and the replica 7; 3 tokens here, 2 there"),
            "{told}"
        );
        let told = difference("a", &some(&[1]), &some(&[1, 7])).unwrap();
        assert!(told.contains("at token 1 the router has its end and the replica 7"), "{told}");
        assert!(difference("a", &None, &some(&[])).unwrap().contains("the router refuses it"));
        assert!(difference("a", &some(&[]), &None).unwrap().contains("the replica refuses it"));
    }
}
