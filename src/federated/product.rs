//! Weighted sums of low-rank products as what they are, `Σ_j l_j r_jᵀ`: their norms, their distances, their singular components, in
//! f64 and without ever making a matrix of the model's size.
//!
//! Separate because it is linear algebra, and knows nothing of clients.

/// `Σ_j left_j right_jᵀ`.
#[derive(Clone, Debug, Default)]
pub(super) struct Product {
    left: Vec<Vec<f64>>,
    right: Vec<Vec<f64>>,
}

/// One singular component, `value · u vᵀ` with u and v of length 1.
#[derive(Clone, Debug)]
pub(super) struct Component {
    pub value: f64,
    u: Vec<f64>,
    v: Vec<f64>,
}

impl Component {
    /// Of the column of B.
    pub fn left(&self, output: usize) -> f64 {
        self.value.sqrt() * self.u[output]
    }

    /// Of the row of A.
    pub fn right(&self, input: usize) -> f64 {
        self.value.sqrt() * self.v[input]
    }

    pub fn outputs(&self) -> usize {
        self.u.len()
    }

    pub fn inputs(&self) -> usize {
        self.v.len()
    }
}

/// Terms beyond which a sum is brought to as few as it has: the work grows with their square.
const MOST_TERMS: usize = 512;

impl Product {
    /// Adds `weight · B A` with A (rank, inputs) and B (outputs, rank), both row major.
    pub fn add(&mut self, weight: f64, a: &[f32], b: &[f32], rank: usize) {
        let inputs = a.len() / rank.max(1);
        for row in 0..rank {
            self.left.push(
                b.iter()
                    .skip(row)
                    .step_by(rank)
                    .map(|value| weight * f64::from(*value))
                    .collect(),
            );
            self.right.push(
                a[row * inputs..(row + 1) * inputs]
                    .iter()
                    .copied()
                    .map(f64::from)
                    .collect(),
            );
        }
        if self.left.len() > MOST_TERMS {
            let components = std::mem::take(self).singular();
            for component in components {
                self.left
                    .push(component.u.iter().map(|value| component.value * value).collect());
                self.right.push(component.v);
            }
        }
    }

    /// The Frobenius norm.
    pub fn norm(&self) -> f64 {
        let mut sum = 0.0;
        for (row, (left, right)) in self.left.iter().zip(&self.right).enumerate() {
            sum += dot(left, left) * dot(right, right);
            for (other_left, other_right) in self.left[..row].iter().zip(&self.right) {
                sum += 2.0 * dot(left, other_left) * dot(right, other_right);
            }
        }
        sum.max(0.0).sqrt()
    }

    /// The singular components, the largest first, those of zero left out. The larger coordinate of each u, the first where there are
    /// several, is positive.
    pub fn singular(self) -> Vec<Component> {
        let (q_left, r_left) = orthonormal(&self.left);
        let (q_right, r_right) = orthonormal(&self.right);
        // The core, (left, right) in the coordinates of the two bases, as columns; fewer columns than rows.
        let is_wide = q_right.len() > q_left.len();
        let (rows, columns) = match is_wide {
            false => (&r_left, &r_right),
            true => (&r_right, &r_left),
        };
        let (row_count, column_count) = (q_left.len().max(q_right.len()), q_left.len().min(q_right.len()));
        let mut core = vec![vec![0.0; row_count]; column_count];
        for (row, column) in rows.iter().zip(columns) {
            for (core, factor) in core.iter_mut().zip(column) {
                for (sum, value) in core.iter_mut().zip(row) {
                    *sum += factor * value;
                }
            }
        }
        let mut turned: Vec<Vec<f64>> = (0..column_count)
            .map(|column| {
                (0..column_count)
                    .map(|row| f64::from(u8::from(row == column)))
                    .collect()
            })
            .collect();
        jacobi(&mut core, &mut turned);
        let mut components: Vec<Component> = core
            .into_iter()
            .zip(turned)
            .filter_map(|(column, turn)| {
                let value = dot(&column, &column).sqrt();
                (value > 0.0 && value.is_finite()).then(|| {
                    let long: Vec<f64> = column.iter().map(|entry| entry / value).collect();
                    let (left, right) = match is_wide {
                        false => (&long, &turn),
                        true => (&turn, &long),
                    };
                    let (mut u, mut v) = (combine(&q_left, left), combine(&q_right, right));
                    let largest = u
                        .iter()
                        .fold(0.0_f64, |largest, entry| match entry.abs() > largest.abs() {
                            true => *entry,
                            false => largest,
                        });
                    if largest < 0.0 {
                        u.iter_mut().chain(&mut v).for_each(|entry| *entry = -*entry);
                    }
                    Component { value, u, v }
                })
            })
            .collect();
        components.sort_by(|one, other| other.value.total_cmp(&one.value));
        components
    }
}

fn dot(one: &[f64], other: &[f64]) -> f64 {
    one.iter().zip(other).map(|(one, other)| one * other).sum()
}

fn combine(basis: &[Vec<f64>], factors: &[f64]) -> Vec<f64> {
    let mut sum = vec![0.0; basis.first().map_or(0, Vec::len)];
    for (vector, factor) in basis.iter().zip(factors) {
        for (sum, value) in sum.iter_mut().zip(vector) {
            *sum += factor * value;
        }
    }
    sum
}

/// An orthonormal basis of the vectors' span, and their coordinates in it (Gram-Schmidt, each vector twice). A vector that is all but
/// a part of 10^-13 in the span of those before it adds nothing to the basis.
fn orthonormal(vectors: &[Vec<f64>]) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let mut basis: Vec<Vec<f64>> = Vec::new();
    let mut coordinates = Vec::with_capacity(vectors.len());
    for vector in vectors {
        let mut rest = vector.clone();
        let mut own = vec![0.0; basis.len()];
        for _ in 0..2 {
            for (direction, own) in basis.iter().zip(&mut own) {
                let part = dot(direction, &rest);
                *own += part;
                for (rest, direction) in rest.iter_mut().zip(direction) {
                    *rest -= part * direction;
                }
            }
        }
        let (length, whole) = (dot(&rest, &rest).sqrt(), dot(vector, vector).sqrt());
        if length > 1e-13 * whole && basis.len() < vector.len() {
            rest.iter_mut().for_each(|entry| *entry /= length);
            basis.push(rest);
            own.push(length);
        }
        coordinates.push(own);
    }
    (basis, coordinates)
}

/// Turns columns until they are at right angles to each other (one-sided Jacobi, Hestenes 1958), and the columns of `turned` with
/// them.
fn jacobi(columns: &mut [Vec<f64>], turned: &mut [Vec<f64>]) {
    /// It takes less than ten.
    const MOST_SWEEPS: usize = 60;
    for _ in 0..MOST_SWEEPS {
        let mut is_done = true;
        for second in 1..columns.len() {
            for first in 0..second {
                let (one, other) = (
                    dot(&columns[first], &columns[first]),
                    dot(&columns[second], &columns[second]),
                );
                let both = dot(&columns[first], &columns[second]);
                if both.abs() <= 1e-14 * (one * other).sqrt() || both == 0.0 {
                    continue;
                }
                is_done = false;
                let zeta = (other - one) / (2.0 * both);
                let tangent = zeta.signum() / (zeta.abs() + zeta.hypot(1.0));
                let cosine = 1.0 / tangent.hypot(1.0);
                let sine = cosine * tangent;
                for vectors in [&mut *columns, &mut *turned] {
                    let (before, from) = vectors.split_at_mut(second);
                    for (one, other) in before[first].iter_mut().zip(&mut from[0]) {
                        (*one, *other) = (cosine * *one - sine * *other, sine * *one + cosine * *other);
                    }
                }
            }
        }
        if is_done {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_are_orthonormal_and_sum_up_to_the_product() {
        // Two equal terms and one that cancels another: rank 2 of five terms, more terms than rows.
        let terms: [([f32; 2], [f32; 3]); 5] = [
            ([1.0, 2.0], [1.0, 0.0, 2.0]),
            ([1.0, 2.0], [1.0, 0.0, 2.0]),
            ([-3.0, 0.5], [0.25, 1.0, 0.0]),
            ([5.0, 5.0], [1.0, 1.0, 1.0]),
            ([-5.0, -5.0], [1.0, 1.0, 1.0]),
        ];
        let mut product = Product::default();
        let mut dense = [[0.0_f64; 3]; 2];
        for (b, a) in terms {
            product.add(0.5, &a, &b, 1);
            for (row, b) in dense.iter_mut().zip(b) {
                for (sum, a) in row.iter_mut().zip(a) {
                    *sum += 0.5 * f64::from(b) * f64::from(a);
                }
            }
        }
        let norm = dense
            .as_flattened()
            .iter()
            .map(|value| value * value)
            .sum::<f64>()
            .sqrt();
        assert!((product.norm() - norm).abs() < 1e-12 * norm);
        let components = product.singular();
        assert_eq!(components.len(), 2);
        assert!(components[0].value > components[1].value);
        for (row, dense) in dense.iter().enumerate() {
            for (column, dense) in dense.iter().enumerate() {
                let sum: f64 = components.iter().map(|one| one.left(row) * one.right(column)).sum();
                assert!((sum - dense).abs() < 1e-12, "{sum} and {dense}");
            }
        }
        assert!(dot(&components[0].u, &components[1].u).abs() < 1e-14);
        assert!(dot(&components[0].v, &components[1].v).abs() < 1e-14);
        assert!(Product::default().singular().is_empty());
    }
}
