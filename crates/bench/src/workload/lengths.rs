//! How long prompts and answers are.
//!
//! Lengths are drawn in strata: each hundred draws have one value from every hundredth of the distribution, in random
//! order. So a run of a few hundred requests has the quantiles it should, and two runs differ less by luck.

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const STRATA: usize = 100;

/// Longest length that is taken: far above every context there is.
pub const MAX_TOKENS: u32 = 1 << 24;

/// A distribution of token counts.
#[derive(Clone, Debug, PartialEq)]
pub enum Lengths {
    /// Every whole number of a range, equally often.
    Uniform(Span),
    Table(Quantiles),
}

/// A range of token counts, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub least: u32,
    pub most: u32,
}

/// A range of lengths that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no length; give tokens such as 512, or a range such as 100:1024, from 1 to {MAX_TOKENS}")]
pub struct SpanError(String);

impl Span {
    pub const fn exactly(tokens: u32) -> Self {
        Self { least: tokens, most: tokens }
    }
}

impl std::str::FromStr for Span {
    type Err = SpanError;

    /// Reads `512` or `100:1024`.
    fn from_str(text: &str) -> Result<Self, SpanError> {
        let wrong = || SpanError(text.to_owned());
        let number = |text: &str| text.trim().parse::<u32>().map_err(|_| wrong());
        let (least, most) = match text.split_once(':') {
            Some((least, most)) => (number(least)?, number(most)?),
            None => (number(text)?, number(text)?),
        };
        let fits = 1 <= least && least <= most && most <= MAX_TOKENS;
        if fits { Ok(Self { least, most }) } else { Err(wrong()) }
    }
}

impl std::fmt::Display for Span {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { least, most } = self;
        if least == most { write!(out, "{least}") } else { write!(out, "{least}:{most}") }
    }
}

impl Lengths {
    /// The length at `share` of the distribution, from 0 to 1.
    pub fn at(&self, share: f64) -> u32 {
        match self {
            Self::Uniform(Span { least, most }) => {
                let width = f64::from(most - least) + 1.0;
                (least + (share * width) as u32).min(*most)
            }
            Self::Table(table) => table.at(share),
        }
    }

    pub fn most(&self) -> u32 {
        match self {
            Self::Uniform(span) => span.most,
            Self::Table(table) => table.points[table.points.len() - 1].1.exp().round() as u32,
        }
    }
}

/// A distribution given by some of its quantiles: between them the logarithm of the length is linear in the share,
/// which is monotone and meets every one of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantiles {
    /// Share and logarithm of the length, ascending in both, from 0 to 1.
    points: Vec<(f64, f64)>,
}

impl Quantiles {
    /// From percentiles and lengths; `None` unless both ascend and lie within 1 and [`MAX_TOKENS`].
    pub fn new(percentiles: &[f64], lengths: &[u32], least: u32, most: u32) -> Option<Self> {
        let inner = percentiles.iter().zip(lengths).map(|(percent, tokens)| (percent / 100.0, *tokens));
        let all = std::iter::once((0.0, least)).chain(inner).chain([(1.0, most)]);
        let points: Vec<(f64, f64)> = all.map(|(share, tokens)| (share, f64::from(tokens).ln())).collect();
        let ascends = points.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1);
        let fits = percentiles.len() == lengths.len() && least >= 1 && most <= MAX_TOKENS;
        (ascends && fits).then_some(Self { points })
    }

    fn at(&self, share: f64) -> u32 {
        let share = share.clamp(0.0, 1.0);
        let above = self.points.partition_point(|(at, _)| *at < share).clamp(1, self.points.len() - 1);
        let ((s0, l0), (s1, l1)) = (self.points[above - 1], self.points[above]);
        (l0 + (l1 - l0) * (share - s0) / (s1 - s0)).exp().round() as u32
    }
}

/// Shares between 0 and 1, evenly spread over each hundred of them. Endless.
#[derive(Clone, Debug)]
pub struct Strata {
    random: ChaCha8Rng,
    block: Vec<f64>,
}

impl Strata {
    /// `stream` tells the sequences of one seed apart.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(stream);
        Self { random, block: Vec::new() }
    }

    pub fn share(&mut self) -> f64 {
        loop {
            if let Some(share) = self.block.pop() {
                return share;
            }
            let Self { random, block } = self;
            block.extend((0..STRATA).map(|at| (at as f64 + random.random::<f64>()) / STRATA as f64));
            block.shuffle(random);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_are_read_as_people_type_them() {
        assert_eq!("512".parse(), Ok(Span::exactly(512)));
        assert_eq!("100:1024".parse(), Ok(Span { least: 100, most: 1024 }));
        for text in ["", "0", "-1", "5:4", "a", "1:", "99999999999", "1:2:3"] {
            let error = text.parse::<Span>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }

    #[test]
    fn a_range_has_every_length_equally_often() {
        let lengths = Lengths::Uniform(Span { least: 1, most: 4 });
        let mut strata = Strata::new(1, 0);
        let mut counts = [0; 5];
        (0..1000).for_each(|_| counts[lengths.at(strata.share()) as usize] += 1);
        assert_eq!(counts, [0, 250, 250, 250, 250]);
    }

    #[test]
    fn strata_depend_on_seed_and_stream() {
        let draw = |seed, stream| {
            let mut strata = Strata::new(seed, stream);
            (0..10).map(|_| strata.share()).collect::<Vec<_>>()
        };
        assert_eq!(draw(1, 1), draw(1, 1));
        assert_ne!(draw(1, 1), draw(1, 2));
        assert_ne!(draw(1, 1), draw(2, 1));
    }

    proptest! {
        #[test]
        fn a_table_is_monotone_and_meets_its_quantiles(mut lengths in prop::collection::vec(1_u32..100_000, 5)) {
            lengths.sort_unstable();
            let [least, a, b, c, most] = lengths[..] else { unreachable!() };
            let table = Quantiles::new(&[25.0, 50.0, 90.0], &[a, b, c], least, most).unwrap();
            for (share, tokens) in [(0.0, least), (0.25, a), (0.5, b), (0.9, c), (1.0, most)] {
                prop_assert_eq!(table.at(share), tokens);
            }
            let shares = (0..=1000).map(|at| table.at(f64::from(at) / 1000.0)).collect::<Vec<_>>();
            prop_assert!(shares.windows(2).all(|pair| pair[0] <= pair[1]));
        }
    }

    #[test]
    fn quantiles_that_descend_are_no_table() {
        assert_eq!(Quantiles::new(&[25.0, 50.0], &[5, 4], 1, 9), None);
        assert_eq!(Quantiles::new(&[50.0], &[5], 0, 9), None);
        assert_eq!(Quantiles::new(&[50.0, 60.0], &[5], 1, 9), None);
    }
}
