//! What a simulated device says: sentences of a fixed list, in an order that the request decides.
//!
//! The list is text; whoever has a tokenizer turns it into tokens. Nothing is stored for a request: the token at a
//! position of an answer is a function of the answer's seed, so that a sequence that was preempted goes on where it
//! was.

use servelab_engine::TokenId;

use crate::device_chain::mix;

/// One sentence a line.
const SENTENCES: &str = include_str!("../data/sentences.txt");

/// Quantiles of the lengths at which answers are about to end, in tokens: the output lengths of the Azure LLM
/// inference trace 2023, conversation. (The least is ours: a sentence is the shortest answer anyway.)
const LENGTHS: [(f64, f64); 9] = [
    (0.0, 8.0),
    (0.1, 54.0),
    (0.25, 85.0),
    (0.5, 129.0),
    (0.75, 395.0),
    (0.9, 424.0),
    (0.95, 451.0),
    (0.99, 601.0),
    (1.0, 1000.0),
];

/// Most tokens that are looked at for one that is not banned.
const ALTERNATIVES: u32 = 256;

/// The sentences as tokens, and the token that ends an answer.
#[derive(Clone, Debug)]
pub struct Answers {
    sentences: Vec<Sentence>,
    end: Option<TokenId>,
}

#[derive(Clone, Debug)]
struct Sentence {
    /// At the beginning of an answer, and after another sentence.
    first: Vec<TokenId>,
    next: Vec<TokenId>,
}

impl Answers {
    /// The sentences in the tokens that `encode` makes of them. Without `end`, answers go on until they are cut.
    ///
    /// # Errors
    /// Those of `encode`.
    pub fn new<E>(
        mut encode: impl FnMut(&str) -> Result<Vec<TokenId>, E>,
        end: Option<TokenId>,
    ) -> Result<Self, E> {
        let mut sentences = Vec::new();
        for line in SENTENCES.lines() {
            let (first, next) = (encode(line)?, encode(&format!(" {line}"))?);
            // A tokenizer that has no token for any of it leaves nothing to say.
            if !first.is_empty() && !next.is_empty() {
                sentences.push(Sentence { first, next });
            }
        }
        if sentences.is_empty() {
            sentences.push(Sentence { first: vec![0], next: vec![0] });
        }
        Ok(Self { sentences, end })
    }

    /// Any tokens will do where nobody reads them: 64 sentences of 16 tokens, without an end.
    pub fn unread() -> Self {
        let tokens = |sentence: u32| (16 * sentence..16 * sentence + 16).collect::<Vec<_>>();
        let sentence = |sentence| Sentence { first: tokens(sentence), next: tokens(sentence) };
        Self { sentences: (0..64).map(sentence).collect(), end: None }
    }

    /// The token at `index` of the answer of that seed. Once the answer is long enough every sentence is followed by
    /// its end; where that is banned (`min_tokens`), the answer goes on to a later one.
    pub fn token(&self, seed: u64, index: u32, banned: &[TokenId]) -> TokenId {
        let wanted = self.raw(seed, index);
        if !banned.contains(&wanted) {
            return wanted;
        }
        let mut others = (index..index.saturating_add(ALTERNATIVES)).map(|index| self.raw(seed, index));
        others.find(|token| !banned.contains(token)).unwrap_or(wanted)
    }

    fn raw(&self, seed: u64, index: u32) -> TokenId {
        let (index, enough) = (index as usize, length(seed));
        let mut begin = 0;
        for number in 0u64.. {
            let sentence = &self.sentences[(mix(seed, number) % self.sentences.len() as u64) as usize];
            let words = if number == 0 { &sentence.first } else { &sentence.next };
            if let Some(token) = words.get(index - begin) {
                return *token;
            }
            begin += words.len();
            if let Some(end) = self.end.filter(|_| begin >= enough) {
                if index == begin {
                    return end;
                }
                begin += 1;
            }
        }
        unreachable!("a sentence has at least one token")
    }
}

/// After how many tokens an answer ends with its sentence.
fn length(seed: u64) -> usize {
    /// Apart from the numbers that choose sentences.
    const LENGTH: u64 = u64::MAX;
    let share = (mix(seed, LENGTH) >> 11) as f64 / (1u64 << 53) as f64;
    let upper = LENGTHS.iter().position(|(quantile, _)| *quantile > share).unwrap_or(LENGTHS.len() - 1);
    let ((q0, l0), (q1, l1)) = (LENGTHS[upper - 1], LENGTHS[upper]);
    (l0 + (l1 - l0) * (share - q0) / (q1 - q0)) as usize
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    const END: TokenId = 1_000_000;

    /// Every byte is a token.
    fn answers() -> Answers {
        let encode = |text: &str| Ok::<_, Infallible>(text.bytes().map(TokenId::from).collect());
        Answers::new(encode, Some(END)).unwrap()
    }

    fn text(answers: &Answers, seed: u64, tokens: u32) -> String {
        let bytes = (0..tokens).map(|index| answers.token(seed, index, &[END]) as u8);
        String::from_utf8(bytes.collect()).unwrap()
    }

    #[test]
    fn an_answer_is_sentences_of_the_list() {
        let answers = answers();
        let read = text(&answers, 7, 4000);
        let ends: Vec<&str> = read.split_inclusive(". ").collect();
        assert!(ends.len() > 10);
        for sentence in &ends[..ends.len() - 1] {
            assert!(SENTENCES.lines().any(|line| line == sentence.trim()), "{sentence}");
        }
        assert_eq!(read, text(&answers, 7, 4000));
        assert_ne!(read, text(&answers, 8, 4000));
    }

    #[test]
    fn answers_end_with_a_sentence_and_as_long_as_those_of_the_trace() {
        let answers = answers();
        let length = |seed| (0..5000).find(|index| answers.token(seed, *index, &[]) == END).unwrap();
        let mut lengths: Vec<u32> = (0..2000).map(length).collect();
        lengths.sort_unstable();
        // With the rest of a sentence on top.
        let median = lengths[1000];
        assert!((129..300).contains(&median), "{median}");
        assert!(*lengths.last().unwrap() < 1300);
        for seed in 0..50 {
            let text = text(&answers, seed, length(seed));
            assert!(text.ends_with('.'), "{text}");
        }
    }

    #[test]
    fn a_banned_end_comes_with_a_later_sentence() {
        let answers = answers();
        let end = (0..5000).find(|index| answers.token(3, *index, &[]) == END).unwrap();
        assert_ne!(answers.token(3, end, &[END]), END);
        let later = (end + 1..end + 500).find(|index| answers.token(3, *index, &[]) == END);
        assert!(later.is_some());
    }
}
