//! A tokenizer that the router knows, and what it makes of a request.

use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;
use servelab_engine::hash_blocks;
use servelab_front::prompts::{PromptError, Prompter, TextFiles};
use servelab_text::TextError;
use servelab_wire::completions::read_prompts;
use servelab_wire::{Conversation, FieldError, Fields, Prompt, TokenizeRequest};

use crate::choice::fleet::{Exact, TokeniserId};
use crate::prompt::{BLOCK_SIZE, salt};

/// Tokenisers that are kept at once. A fleet has one, and two while a new model is rolled out.
const KEPT: usize = 4;

/// Tokenizer and template of a model.
#[derive(Debug)]
pub struct Tokeniser {
    id: TokeniserId,
    prompter: Prompter,
}

/// Why a request has no tokens: it is wrong, or one that this router cannot read. The replica says which.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Unreadable {
    #[error(transparent)]
    Field(#[from] FieldError),
    #[error(transparent)]
    Prompt(#[from] PromptError),
}

impl Tokeniser {
    /// # Errors
    /// If a file cannot be read.
    pub fn new(files: &TextFiles) -> Result<Self, TextError> {
        Ok(Self { id: TokeniserId(files.revision()), prompter: Prompter::new(files)? })
    }

    pub fn id(&self) -> TokeniserId {
        self.id
    }

    /// What `/tokenize` must answer to this body.
    ///
    /// # Errors
    /// If there is no prompt in it.
    pub fn tokenize(&self, body: Value) -> Result<Vec<u32>, Unreadable> {
        Ok(self.prompter.tokenize(TokenizeRequest::read(body)?)?.tokens.to_vec())
    }

    /// The tokens of the body of a chat or completion, and the chain of the first prompt's blocks: several prompts go
    /// to one replica together.
    ///
    /// # Errors
    /// If there is no prompt in it, or none that can be read.
    pub fn exact(&self, body: Value) -> Result<Exact, Unreadable> {
        let mut fields = Fields::of_body(body)?;
        let salt = salt(fields.string("cache_salt")?.as_deref());
        let special = fields.boolean("add_special_tokens")?;
        let (first, all) = match fields.take("prompt") {
            Some(prompt) if !fields.has("messages") => self.prompts(read_prompts(prompt)?, special)?,
            _ => {
                let chat = Conversation::take(&mut fields)?;
                let tools = fields.list("tools")?.filter(|tools| !tools.is_empty());
                let tokens = self.prompter.chat(&chat, tools.as_deref(), special.unwrap_or(false))?.tokens;
                let all = tokens.len();
                (tokens.to_vec(), all)
            }
        };
        Ok(Exact {
            tokeniser: self.id,
            tokens: u32::try_from(all).unwrap_or(u32::MAX),
            first_tokens: u32::try_from(first.len()).unwrap_or(u32::MAX),
            chain: hash_blocks(&first, BLOCK_SIZE as usize, salt),
        })
    }

    /// The tokens of the first prompt, and how many all have.
    fn prompts(&self, prompts: Vec<Prompt>, special: Option<bool>) -> Result<(Vec<u32>, usize), Unreadable> {
        let (mut first, mut all) = (None, 0);
        for prompt in prompts {
            let tokens = match prompt {
                Prompt::Tokens(tokens) => tokens,
                Prompt::Text(text) => self.prompter.text(text, special.unwrap_or(true))?.tokens.to_vec(),
            };
            all += tokens.len();
            first.get_or_insert(tokens);
        }
        Ok((first.unwrap_or_default(), all))
    }
}

/// The tokenisers that replicas have been found to have: replicas of one model share one.
#[derive(Debug, Default)]
pub struct Tokenisers(Mutex<Vec<Arc<Tokeniser>>>);

impl Tokenisers {
    pub fn get(&self, id: TokeniserId) -> Option<Arc<Tokeniser>> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().find(|tokeniser| tokeniser.id == id).cloned()
    }

    /// Keeps it, and forgets the oldest that nobody uses if there are too many. `None` if there is no room.
    pub fn put(&self, tokeniser: Arc<Tokeniser>) -> Option<Arc<Tokeniser>> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(same) = known.iter().find(|known| known.id == tokeniser.id) {
            return Some(same.clone());
        }
        if known.len() >= KEPT {
            let unused = known.iter().position(|known| Arc::strong_count(known) == 1)?;
            known.remove(unused);
        }
        known.push(tokeniser.clone());
        Some(tokeniser)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    /// Words are tokens; the template writes roles and tools.
    pub(crate) fn files(template: &'static str) -> TextFiles {
        let words = "[UNK] user assistant system : a block is sixteen tokens what tools f <s>";
        let vocab: serde_json::Map<String, Value> =
            words.split(' ').zip(0..).map(|(word, id)| (word.to_owned(), json!(id))).collect();
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "added_tokens": [],
            "pre_tokenizer": {"type": "Whitespace"}, "decoder": null,
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [13], "tokens": ["<s>"]}}},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
        });
        TextFiles {
            tokenizer: file.to_string().into(),
            chat_template: Some(template.into()),
            ..TextFiles::default()
        }
    }

    pub(crate) const TEMPLATE: &str = "{% if tools %}tools {{ tools[0].function.name }} {% endif %}\
        {% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}";

    #[test]
    fn a_request_is_tokenised_as_a_replica_does_it() {
        let tokeniser = Tokeniser::new(&files(TEMPLATE)).unwrap();
        let tokens = |body: Value| {
            let exact = tokeniser.exact(body).unwrap();
            (exact.first_tokens, exact.tokens)
        };
        let chat = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
        assert_eq!(
            tokens(chat(json!("what is a block"))),
            (8, 8),
            "role, colon, four words, assistant, colon"
        );
        assert_eq!(
            tokens(chat(json!([{"type": "text", "text": "what is"}, {"type": "text", "text": "a"}]))),
            (7, 7)
        );
        let mut with_tools = chat(json!("what"));
        with_tools["tools"] = json!([{"type": "function", "function": {"name": "f"}}]);
        assert_eq!(tokens(with_tools), (7, 7));
        assert_eq!(tokens(json!({"prompt": "a block"})), (3, 3), "and the beginning of sequence");
        assert_eq!(tokens(json!({"prompt": "a block", "add_special_tokens": false})), (2, 2));
        assert_eq!(tokens(json!({"prompt": ["a block", [1, 2], "a"]})), (3, 3 + 2 + 2), "all count");
        assert_eq!(tokens(json!({"prompt": [5, 6, 7]})), (3, 3));
        for wrong in [json!({}), json!([]), json!({"messages": []}), json!({"prompt": {"a": 1}})] {
            assert!(tokeniser.exact(wrong.clone()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn few_tokenisers_are_kept_and_those_in_use_stay() {
        let tokenisers = Tokenisers::default();
        let make = |template| Arc::new(Tokeniser::new(&files(template)).unwrap());
        let used = tokenisers.put(make("used")).unwrap();
        for template in ["1", "2", "3", "4", "5", "6"] {
            assert!(tokenisers.put(make(template)).is_some());
        }
        assert!(tokenisers.get(used.id()).is_some());
        assert!(tokenisers.get(make("1").id()).is_none() && tokenisers.get(make("6").id()).is_some());
        let _all: Vec<_> =
            ["4", "5", "6"].into_iter().map(|template| tokenisers.get(make(template).id())).collect();
        assert!(tokenisers.put(make("7")).is_none(), "there is no room");
    }
}
