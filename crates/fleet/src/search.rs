//! The smallest fleet that keeps an SLO, found by trying.

use crate::outcome::Outcome;
use crate::run::simulate;
use crate::scaler::Scaler;
use crate::settings::{Settings, SettingsError};

/// What a search gave.
#[derive(Clone, Debug)]
pub struct Search {
    /// The smallest fleet that kept the SLO; none if the largest did not.
    pub smallest: Option<u32>,
    /// All that were tried, by their number of replicas.
    pub tried: Vec<(u32, Outcome)>,
}

/// Tries fleets of 1 to `most` replicas, `guess` first: twice as many until one keeps the SLO, half as many until one
/// does not, and then in between. `with` makes the settings for so many replicas.
///
/// It takes for granted that a larger fleet keeps what a smaller one does; by chance a search near the edge may be one
/// off.
///
/// # Errors
/// If a setting cannot be.
pub fn smallest_fleet<E: From<SettingsError>>(
    guess: u32,
    most: u32,
    mut with: impl FnMut(u32) -> Result<Settings, E>,
) -> Result<Search, E> {
    let mut tried: Vec<(u32, Outcome)> = Vec::new();
    let mut keeps = |replicas: u32| -> Result<bool, E> {
        let outcome = simulate(with(replicas)?, Scaler::fixed(replicas))?;
        let is_kept = outcome.slo_is_kept();
        tried.push((replicas, outcome));
        Ok(is_kept)
    };
    let guess = guess.clamp(1, most.max(1));
    // The largest that is known to break it, and the smallest that is known to keep it.
    let (mut broken, mut kept) = (0, None);
    if keeps(guess)? {
        let mut at = guess;
        kept = Some(at);
        while at > 1 {
            at = at.div_ceil(2).min(at - 1);
            if !keeps(at)? {
                broken = at;
                break;
            }
            kept = Some(at);
        }
    } else {
        let mut at = guess;
        broken = at;
        while at < most {
            at = at.saturating_mul(2).min(most);
            if keeps(at)? {
                kept = Some(at);
                break;
            }
            broken = at;
        }
    }
    while let Some(above) = kept
        && above - broken > 1
    {
        let middle = broken + (above - broken) / 2;
        if keeps(middle)? { kept = Some(middle) } else { broken = middle }
    }
    tried.sort_by_key(|(replicas, _)| *replicas);
    Ok(Search { smallest: kept, tried })
}
