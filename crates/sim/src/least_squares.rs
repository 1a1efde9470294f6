//! Least squares with a few coefficients, none of them negative.

/// An equation: coefficients times the row are the number.
type Equation<const N: usize> = ([f64; N], f64);

/// Which columns are more than combinations of those in front of them, by at least `least_new_part` of their length
/// (Gram-Schmidt).
pub fn independent<const N: usize>(rows: &[Equation<N>], least_new_part: f64) -> [bool; N] {
    let mut basis: Vec<Vec<f64>> = Vec::new();
    std::array::from_fn(|column| {
        let mut rest = values(rows, column);
        let whole = norm(&rest);
        for direction in &basis {
            let along = dot(&rest, direction);
            rest.iter_mut().zip(direction).for_each(|(value, unit)| *value -= along * unit);
        }
        let new = norm(&rest);
        let is_new = whole > 0.0 && new > least_new_part * whole;
        if is_new {
            basis.push(rest.into_iter().map(|value| value / new).collect());
        }
        is_new
    })
}

/// The coefficients, none of them negative and those that are not `allowed` 0, that come closest to all equations. They
/// are so few that every choice of those that are not 0 is tried.
pub fn least_squares<const N: usize>(rows: &[Equation<N>], allowed: [bool; N]) -> [f64; N] {
    let allowed = (0..N).filter(|index| allowed[*index]).fold(0u32, |set, index| set | 1 << index);
    let sets = (1..1u32 << N).filter(|set| set & !allowed == 0);
    let solutions =
        sets.filter_map(|set| solve(rows, set)).filter(|row| row.iter().all(|value| *value >= 0.0));
    let error = |solution: &[f64; N]| {
        rows.iter().map(|(row, wanted)| (dot(row, solution) - wanted).powi(2)).sum::<f64>()
    };
    solutions.min_by(|a, b| error(a).total_cmp(&error(b))).unwrap_or([0.0; N])
}

/// With the columns of `set` alone: the normal equations by elimination, columns scaled to length 1. `None` if they
/// depend on each other.
fn solve<const N: usize>(rows: &[Equation<N>], set: u32) -> Option<[f64; N]> {
    let columns: Vec<usize> = (0..N).filter(|index| set & (1 << index) != 0).collect();
    let scales: Vec<f64> = columns.iter().map(|column| norm(&values(rows, *column))).collect();
    let unit = |(column, scale): (&usize, &f64)| -> Vec<f64> {
        values(rows, *column).into_iter().map(|value| value / scale).collect()
    };
    let units: Vec<Vec<f64>> = columns.iter().zip(&scales).map(unit).collect();
    let wanted: Vec<f64> = rows.iter().map(|(_, wanted)| *wanted).collect();
    // Each equation with its right side behind it.
    let equation = |a: &Vec<f64>| -> Vec<f64> { units.iter().chain([&wanted]).map(|b| dot(a, b)).collect() };
    let mut equations: Vec<Vec<f64>> = units.iter().map(equation).collect();
    eliminate(&mut equations)?;
    let mut solution = [0.0; N];
    for (index, column) in columns.iter().enumerate() {
        solution[*column] = equations[index][columns.len()] / scales[index];
    }
    Some(solution)
}

/// Gauss-Jordan without exchanges, for a positive definite matrix. `None` if it is not.
fn eliminate(equations: &mut [Vec<f64>]) -> Option<()> {
    for pivot in 0..equations.len() {
        let head = equations[pivot][pivot];
        // Not-a-number, of a column of zeros, is no head either.
        if head.is_nan() || head < 1e-9 {
            return None;
        }
        equations[pivot].iter_mut().for_each(|value| *value /= head);
        let row = equations[pivot].clone();
        for other in (0..equations.len()).filter(|other| *other != pivot) {
            let factor = equations[other][pivot];
            equations[other].iter_mut().zip(&row).for_each(|(value, pivot)| *value -= factor * pivot);
        }
    }
    Some(())
}

fn values<const N: usize>(rows: &[Equation<N>], column: usize) -> Vec<f64> {
    rows.iter().map(|(row, _)| row[column]).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_equations_are_solved() {
        let rows = [([1.0, 2.0, 0.0], 5.0), ([2.0, 1.0, 0.0], 4.0), ([1.0, 1.0, 0.0], 3.0)];
        let seen = independent(&rows, 0.01);
        assert_eq!(seen, [true, true, false]);
        let solution = least_squares(&rows, seen);
        assert!((solution[0] - 1.0).abs() < 1e-9 && (solution[1] - 2.0).abs() < 1e-9 && solution[2] == 0.0);
    }

    #[test]
    fn what_would_be_negative_is_zero_and_the_rest_makes_the_best_of_it() {
        // y = 3 - x at x = 1, 2, 3: without a negative slope the mean is best.
        let rows = [([1.0, 1.0], 2.0), ([1.0, 2.0], 1.0), ([1.0, 3.0], 0.0)];
        let solution = least_squares(&rows, [true, true]);
        assert!((solution[0] - 1.0).abs() < 1e-9 && solution[1] == 0.0, "{solution:?}");
    }

    #[test]
    fn a_column_that_is_another_one_twice_is_not_seen() {
        let rows = [([1.0, 2.0], 1.0), ([3.0, 6.0], 2.0)];
        assert_eq!(independent(&rows, 0.01), [true, false]);
    }
}
