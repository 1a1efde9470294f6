//! The likeliest tokens of a row without sorting the vocabulary.

use std::cmp::Ordering;

use servelab_engine::TokenId;

/// A token and its logit.
pub type Candidate = (TokenId, f32);

/// Likeliest first; of equal logits the smaller token id first, so that the order is total.
fn order(a: &Candidate, b: &Candidate) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The token with the largest logit, the smallest id among equals.
pub fn argmax(logits: &[f32]) -> Candidate {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, logit) in logits.iter().enumerate() {
        if *logit > best.1 {
            best = (token as TokenId, *logit);
        }
    }
    best
}

/// The `k` likeliest tokens, likeliest first: one pass that keeps `k` of them when `k` is small,
/// else a partition.
pub fn top_k(logits: &[f32], k: usize, out: &mut Vec<Candidate>) {
    out.clear();
    let k = k.min(logits.len());
    if k == 0 {
        return;
    }
    if k > 64 {
        out.extend(logits.iter().enumerate().map(|(token, logit)| (token as TokenId, *logit)));
        keep_first(out, k);
        return;
    }
    for (token, logit) in logits.iter().enumerate() {
        let candidate = (token as TokenId, *logit);
        if out.len() == k {
            if order(&candidate, &out[k - 1]) != Ordering::Less {
                continue;
            }
            out.pop();
        }
        let place = out.partition_point(|kept| order(kept, &candidate) == Ordering::Less);
        out.insert(place, candidate);
    }
}

/// Cuts to the `k` likeliest and sorts those.
pub fn keep_first(candidates: &mut Vec<Candidate>, k: usize) {
    if k < candidates.len() {
        candidates.select_nth_unstable_by(k, order);
        candidates.truncate(k);
    }
    candidates.sort_unstable_by(order);
}

/// Cuts to the smallest set of likeliest tokens whose weights (`weight(logit)`) reach `target`, and
/// sorts those. Partitions off ever larger groups, since the set is mostly small.
pub fn keep_nucleus(candidates: &mut Vec<Candidate>, target: f64, weight: impl Fn(f32) -> f64) {
    let (mut done, mut sum, mut group) = (0, 0.0, 32);
    while done < candidates.len() {
        let rest = &mut candidates[done..];
        let size = group.min(rest.len());
        if size < rest.len() {
            rest.select_nth_unstable_by(size, order);
        }
        rest[..size].sort_unstable_by(order);
        for (index, (_, logit)) in rest[..size].iter().enumerate() {
            sum += weight(*logit);
            if sum >= target {
                candidates.truncate(done + index + 1);
                return;
            }
        }
        done += size;
        group *= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize, salt: u32) -> Vec<f32> {
        // Coarse, so that equal logits occur.
        (0..n as u32).map(|i| ((i ^ salt).wrapping_mul(2_654_435_761) >> 22) as f32 / 64.0).collect()
    }

    #[test]
    fn top_k_is_the_head_of_a_full_sort() {
        let mut out = Vec::new();
        for n in [1, 2, 63, 64, 1000] {
            let logits = noise(n, 5);
            let mut sorted: Vec<Candidate> = logits.iter().enumerate().map(|(t, l)| (t as u32, *l)).collect();
            sorted.sort_by(order);
            assert_eq!(argmax(&logits), sorted[0]);
            for k in [0, 1, 2, 20, 64, 65, 500, 5000] {
                top_k(&logits, k, &mut out);
                assert_eq!(out, sorted[..k.min(n)], "n {n}, k {k}");
            }
        }
    }

    #[test]
    fn a_nucleus_is_the_shortest_head_that_reaches_the_target() {
        for target in [0.0, 1.0, 40.0, 900.0, 1e9] {
            let logits = noise(700, 9);
            let mut sorted: Vec<Candidate> = logits.iter().enumerate().map(|(t, l)| (t as u32, *l)).collect();
            sorted.sort_by(order);
            let mut sum = 0.0;
            let reaches = |c: &Candidate| {
                sum += f64::from(c.1);
                sum >= target
            };
            let length = sorted.iter().position(reaches).map_or(sorted.len(), |at| at + 1);
            let mut kept: Vec<Candidate> = logits.iter().enumerate().map(|(t, l)| (t as u32, *l)).collect();
            keep_nucleus(&mut kept, target, f64::from);
            assert_eq!(kept[..length], sorted[..length], "target {target}");
            assert_eq!(kept.len(), length);
        }
    }
}
