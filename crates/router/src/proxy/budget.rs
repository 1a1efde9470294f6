//! The retry budget: attempts after the first are a share of the requests, so that a fleet in trouble does not get
//! several times the load (Finagle's `RetryBudget`).

use std::sync::{Mutex, PoisonError};

/// Each request earns that much of a retry.
const SHARE: f64 = 0.2;

#[derive(Debug)]
pub struct Budget {
    balance: Mutex<f64>,
    most: f64,
}

impl Budget {
    /// A replica that dies takes all its requests with it at once: `most`, what it may have in flight, is there from
    /// the beginning, and no more is ever saved.
    pub fn new(most: usize) -> Self {
        let most = (most as f64).max(1.0);
        Self { balance: Mutex::new(most), most }
    }

    /// A request came.
    pub fn earn(&self) {
        let mut balance = self.balance.lock().unwrap_or_else(PoisonError::into_inner);
        *balance = (*balance + SHARE).min(self.most);
    }

    /// Whether one more attempt may be made.
    pub fn spend(&self) -> bool {
        let mut balance = self.balance.lock().unwrap_or_else(PoisonError::into_inner);
        let may = *balance >= 1.0;
        if may {
            *balance -= 1.0;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_everything_fails_a_fifth_is_tried_again() {
        let budget = Budget::new(512);
        while budget.spend() {}
        let mut retries = 0;
        for _ in 0..1000 {
            budget.earn();
            retries += u32::from(budget.spend());
        }
        assert!((195..=200).contains(&retries), "{retries}");
        (0..100_000).for_each(|_| budget.earn());
        let burst = std::iter::from_fn(|| budget.spend().then_some(())).count();
        assert_eq!(burst, 512);
    }
}
