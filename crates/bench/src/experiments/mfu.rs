//! What a prefill reaches of the hardware's arithmetic: its products and its attention apart, since the one grows with
//! the tokens and the other with their square. A single share, taken from short prompts, misleads about long ones.

use super::expect::Prefill;
use crate::ledger::unit::percent;

/// Shares of the FLOP/s.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mfu {
    pub products: f64,
    pub attention: f64,
}

/// How much longer a prompt took than the one before it.
#[derive(Clone, Copy, Debug)]
pub struct Growth {
    pub from_tokens: u32,
    pub to_tokens: u32,
    pub more_seconds: f64,
}

impl Mfu {
    /// Those with which F5 grows as measured, over two stretches of prompt lengths. Where no positive shares do so, as
    /// noise or a nearly straight line may have it, one share for both, of the longer stretch.
    pub fn fitted(prefill: Prefill<'_>, short: Growth, long: Growth) -> Self {
        let products = |growth: Growth| {
            prefill.products_seconds(growth.to_tokens) - prefill.products_seconds(growth.from_tokens)
        };
        let attention = |growth: Growth| {
            prefill.attention_seconds(0, growth.to_tokens) - prefill.attention_seconds(0, growth.from_tokens)
        };
        let determinant = products(short) * attention(long) - products(long) * attention(short);
        let products_slowness =
            (short.more_seconds * attention(long) - long.more_seconds * attention(short)) / determinant;
        let attention_slowness =
            (products(short) * long.more_seconds - products(long) * short.more_seconds) / determinant;
        let fits = |slowness: f64| slowness.is_finite() && slowness > 0.0;
        if fits(products_slowness) && fits(attention_slowness) {
            return Self { products: 1.0 / products_slowness, attention: 1.0 / attention_slowness };
        }
        let both = (products(long) + attention(long)) / long.more_seconds;
        Self { products: both, attention: both }
    }

    /// F5 at these shares; the tokens attend to those in the cache too.
    pub fn prefill_seconds(self, prefill: Prefill<'_>, cached_tokens: u32, uncached_tokens: u32) -> f64 {
        prefill.products_seconds(uncached_tokens) / self.products
            + prefill.attention_seconds(cached_tokens, uncached_tokens) / self.attention
    }
}

/// As in "at an MFU of ...".
impl std::fmt::Display for Mfu {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} (attention {})", percent(self.products), percent(self.attention))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Ledger;

    fn growth(prefill: Prefill<'_>, truth: Mfu, from_tokens: u32, to_tokens: u32) -> Growth {
        let seconds = |tokens| truth.prefill_seconds(prefill, 0, tokens);
        Growth { from_tokens, to_tokens, more_seconds: seconds(to_tokens) - seconds(from_tokens) }
    }

    #[test]
    fn two_stretches_tell_products_and_attention_apart() {
        let ledger = Ledger::load().unwrap();
        let prefill = Prefill { shape: &ledger.models["llama-3.1-8b"], flops_per_second: 500e9 };
        let truth = Mfu { products: 0.7, attention: 0.2 };
        let found = Mfu::fitted(prefill, growth(prefill, truth, 32, 256), growth(prefill, truth, 256, 1024));
        assert!((found.products - 0.7).abs() < 1e-6 && (found.attention - 0.2).abs() < 1e-6, "{found:?}");
        let both = Mfu { products: 1.0, attention: 1.0 };
        assert!((both.prefill_seconds(prefill, 10, 90) / prefill.floor_seconds(10, 90) - 1.0).abs() < 1e-9);
    }

    /// The longer stretch was the faster one, which no attention explains.
    #[test]
    fn what_does_not_fit_has_one_share() {
        let ledger = Ledger::load().unwrap();
        let prefill = Prefill { shape: &ledger.models["llama-3.1-8b"], flops_per_second: 500e9 };
        let slow = growth(prefill, Mfu { products: 0.1, attention: 0.1 }, 32, 256);
        let fast = growth(prefill, Mfu { products: 0.5, attention: 0.5 }, 256, 1024);
        let found = Mfu::fitted(prefill, slow, fast);
        assert!((found.products - 0.5).abs() < 1e-6 && (found.attention - 0.5).abs() < 1e-6, "{found:?}");
    }
}
