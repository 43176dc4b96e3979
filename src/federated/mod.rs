//! Clients' adapters to one: ways to aggregate, as values.
//!
//! A client's adapter changes the weights by `ΔW_k = s·B_k A_k`, where s is the run's α/r and the same for all, whatever their ranks.
//! What training wants of a round is `ΔW = Σ_k w_k ΔW_k`, with w_k the client's part of all examples. Averages of the factors are
//! something else, cheaper to send and better against liars; by how much they miss it is told ([`Errors`]).
//!
//! | [`Aggregation`] | what clients go on with | what is validated and saved |
//! |---|---|---|
//! | `mean` | mean of A, mean of B | the same |
//! | `trimmed`, `median` | of each value, the mean without the extremes, or the median | the same |
//! | `flora` | the nearest adapter of the run's rank | `Σ_k w_k B_k A_k` |
//! | `fedex` | mean of A, mean of B | `Σ_k w_k B_k A_k` |
//! | `ffa` | mean of B; A is frozen | the same, which is `Σ_k w_k B_k A` |
//!
//! Pure and by itself, so that the server, the simulator and the tests aggregate with the same few lines. Sums run in f64 and in the
//! order of the adapters, so the result does not depend on anything but the arguments.
//!
//! | file | holds |
//! |---|---|
//! | `mean`, `trimmed`, `median`, `flora`, `fedex`, `ffa` | a way each |
//! | `column` | one value after the other, of all who have it |
//! | `product` | sums of low-rank products: norms, singular components |

mod column;
mod fedex;
mod ffa;
mod flora;
mod mean;
mod median;
mod product;
mod trimmed;

pub use mean::{mean_of_prefixes, weighted_mean};
use product::{Component, Product};
pub use trimmed::trimmed_at_each_end;

use crate::terms::adapter::{AdapterShape, MatrixPlace};
use crate::terms::aggregation::Aggregation;

/// Why adapters cannot be averaged. `index` is the place in the list given.
#[expect(missing_docs, reason = "the messages say it")]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AverageError {
    #[error("there is no adapter to average")]
    Empty,
    #[error("adapter {index} has {length} values where the first has {expected}")]
    WrongLength {
        index: usize,
        length: usize,
        expected: usize,
    },
    #[error("adapter {index} has {length} values, which is not between {least} and {most}")]
    OutOfRange {
        index: usize,
        length: usize,
        least: usize,
        most: usize,
    },
    #[error("the server's copy has {length} values, more than the {whole} of the whole")]
    LongCopy { length: usize, whole: usize },
    #[error("value {position} of adapter {index} is not finite")]
    NotFinite { index: usize, position: usize },
    #[error("value {position} of the server's copy is not finite")]
    CopyNotFinite { position: usize },
    #[error("the adapters' weights add up to zero; at least one needs an example")]
    ZeroWeight,
    #[error("the adapters' weights add up to more than 2^64")]
    WeightOverflow,
    #[error("adapter {index} has {length} values, which is no whole number of blocks at rank {rank}")]
    PartOfBlock { index: usize, length: usize, rank: usize },
    #[error("adapter {index} has rank {rank}, where the run has {most}")]
    Rank { index: usize, rank: usize, most: usize },
}

/// What a client sends of its adapter: the first blocks, at its own rank.
#[derive(Clone, Copy, Debug)]
pub struct ClientAdapter<'a> {
    /// Its examples.
    pub weight: u64,
    /// How many of the first blocks it has.
    pub blocks: usize,
    /// Its own rank, up to the run's.
    pub rank: usize,
    /// The trained values, flat.
    pub values: &'a [f32],
}

/// The main server's copy of the last blocks, for clients that do not hold them.
#[derive(Clone, Copy, Debug)]
struct Copied<'a> {
    values: &'a [f32],
    /// The first block of it, and where that lies in the whole adapter.
    first: usize,
    start: usize,
}

/// What the copy says of one block.
struct CopiedBlock<'a> {
    values: &'a [f32],
    start: usize,
    weight: u64,
    clients: usize,
}

impl<'a> Copied<'a> {
    /// `None` where everybody holds the block.
    fn of(&self, block: usize, adapters: &[ClientAdapter<'_>]) -> Option<CopiedBlock<'a>> {
        if block < self.first {
            return None;
        }
        let without = adapters.iter().filter(|adapter| adapter.blocks <= block);
        let (clients, weight) = without.fold((0, 0), |(clients, weight), one| (clients + 1, weight + one.weight));
        (clients > 0).then_some(CopiedBlock {
            values: self.values,
            start: self.start,
            weight,
            clients,
        })
    }
}

/// The product of every matrix of the first blocks, each at the rank it has.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Exact {
    /// Of every matrix, in the order of the values.
    pub ranks: Vec<u32>,
    /// A and B of every matrix, in order.
    pub values: Vec<f32>,
}

impl Exact {
    /// What cannot be meant with `blocks` blocks of this shape, if something cannot.
    pub fn fault(&self, shape: &AdapterShape, blocks: usize) -> Option<String> {
        let matrices = shape.matrices();
        let expected = matrices.len().saturating_mul(blocks);
        if self.ranks.len() != expected {
            return Some(format!("{} ranks of {expected} matrices", self.ranks.len()));
        }
        let mut len = 0_u64;
        for (&rank, matrix) in self.ranks.iter().zip(matrices.iter().cycle()) {
            if rank > matrix.inputs.min(matrix.outputs) {
                return Some(format!(
                    "rank {rank} of a matrix of {} by {}",
                    matrix.inputs, matrix.outputs
                ));
            }
            // Below 2^24 · 2^25 each, and as many as there are ranks.
            len = len.saturating_add(u64::from(rank) * (u64::from(matrix.inputs) + u64::from(matrix.outputs)));
        }
        if self.values.len() as u64 != len {
            Some(format!("{} values of products of {len}", self.values.len()))
        } else {
            let position = self.values.iter().position(|value| !value.is_finite())?;
            Some(format!("value {position} of the products is not finite"))
        }
    }

    /// Where each matrix lies, for values without a fault.
    fn places<'a>(&'a self, shape: &'a AdapterShape) -> impl Iterator<Item = MatrixPlace> + 'a {
        let mut at = 0;
        let matrices = shape.matrices();
        (self.ranks.iter().zip(matrices.iter().cycle()).enumerate()).map(move |(index, (&rank, matrix))| {
            let (inputs, outputs, rank) = (matrix.inputs as usize, matrix.outputs as usize, rank as usize);
            let (a, b) = (at, at + rank * inputs);
            at = b + rank * outputs;
            MatrixPlace {
                block: index / matrices.len(),
                inputs,
                outputs,
                rank,
                a,
                b,
            }
        })
    }
}

/// An [`Exact`] in the making.
#[derive(Default)]
struct ExactBuilder(Exact);

impl ExactBuilder {
    fn push(&mut self, components: &[Component]) {
        let Exact { ranks, values } = &mut self.0;
        ranks.push(u32::try_from(components.len()).expect("a rank is no more than a side"));
        for component in components {
            values.extend((0..component.inputs()).map(|input| component.right(input) as f32));
        }
        let outputs = components.first().map_or(0, Component::outputs);
        values.extend(
            (0..outputs).flat_map(|output| components.iter().map(move |component| component.left(output) as f32)),
        );
    }

    fn finish(self) -> Exact {
        self.0
    }
}

/// By how much adapters miss `Σ_k w_k B_k A_k`, in the Frobenius norm over all matrices and relative to its own.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Errors {
    /// `‖mean(B)·mean(A) − Σ w B A‖ / ‖Σ w B A‖`: what plain averaging would lose, or loses.
    pub averaging: f64,
    /// By how much what clients go on with misses it: `‖B·A − Σ w B A‖ / ‖Σ w B A‖`.
    pub start: f64,
}

/// What adapters come to.
#[derive(Clone, Debug, PartialEq)]
pub struct Aggregate {
    /// What clients go on with.
    pub values: Vec<f32>,
    /// What is validated and saved, where that is more.
    pub exact: Option<Exact>,
    /// `None` where it would have taken too long to tell.
    pub errors: Option<Errors>,
}

/// How the adapters of a run are aggregated, and what they look like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    aggregation: Aggregation,
    shape: AdapterShape,
}

/// Multiplications that the errors of an average may take: about a second.
const MOST_WORK: f64 = 1e9;

impl Rule {
    /// `None` for a shape in which other matrices are trained than the aggregation says.
    pub fn new(aggregation: Aggregation, shape: AdapterShape) -> Option<Self> {
        (shape.trained() == aggregation.trained()).then_some(Self { aggregation, shape })
    }

    /// By what name.
    pub fn aggregation(&self) -> Aggregation {
        self.aggregation
    }

    /// What the adapters look like.
    pub fn shape(&self) -> &AdapterShape {
        &self.shape
    }

    /// The aggregate of `blocks` blocks. `copy` is what the main server has of the last of them; for a value it weighs as much as the
    /// clients that do not hold its block. `base` is what the round began with: a value that nobody has stays what it is there.
    ///
    /// # Errors
    /// Where lengths, ranks, values or weights cannot be; nothing is computed then.
    pub fn aggregate(
        &self,
        blocks: usize,
        base: &[f32],
        adapters: &[ClientAdapter<'_>],
        copy: &[f32],
    ) -> Result<Aggregate, AverageError> {
        let shape = &self.shape;
        let copied = self.check(blocks, adapters, copy)?;
        let reduce = |reduce: fn(&mut column::Column) -> Option<f64>| {
            column::reduce(shape, blocks, base, adapters, copied, reduce)
        };
        if self.aggregation == Aggregation::Ffa {
            // Σ w B A = mean(B) A, whatever A is.
            return Ok(Aggregate {
                values: reduce(ffa::of_column),
                exact: None,
                errors: Some(Errors::default()),
            });
        }
        let is_even = adapters.iter().all(|adapter| adapter.rank == shape.rank());
        let mean = match is_even {
            // The same sums, without looking for who has what.
            true => {
                let flat: Vec<(u64, &[f32])> = (adapters.iter())
                    .map(|adapter| (adapter.weight, adapter.values))
                    .collect();
                mean_of_prefixes(&flat, shape.len(blocks, shape.rank()), copy)?
            }
            false => reduce(mean::of_column),
        };
        let total: u64 = adapters.iter().map(|adapter| adapter.weight).sum();
        let products = || Products::new(shape, blocks, adapters, copied, total as f64);
        let (values, exact) = match self.aggregation {
            Aggregation::Mean | Aggregation::Ffa => (None, None),
            Aggregation::Trimmed => (Some(reduce(trimmed::of_column)), None),
            Aggregation::Median => (Some(reduce(median::of_column)), None),
            Aggregation::Fedex => (None, Some(fedex::exact(products()))),
            Aggregation::Flora => {
                let (exact, start) = flora::stack(shape, blocks, products(), &mean);
                (Some(start), Some(exact))
            }
        };
        let errors = self.errors(blocks, adapters, products, &mean, values.as_deref());
        Ok(Aggregate {
            values: values.unwrap_or(mean),
            exact,
            errors,
        })
    }

    /// The moments of values whose aggregate is this rule's; `parts` are adapters' own, with their weights.
    ///
    /// # Errors
    /// As [`weighted_mean`].
    pub fn moments(&self, parts: &[(u64, &[f32])]) -> Result<Vec<f32>, AverageError> {
        let mut values = weighted_mean(parts)?;
        let of_column = match self.aggregation {
            Aggregation::Mean | Aggregation::Fedex | Aggregation::Ffa => return Ok(values),
            Aggregation::Trimmed => trimmed::of_column,
            Aggregation::Median => median::of_column,
            Aggregation::Flora => |_: &mut column::Column| Some(0.0),
        };
        let mut column = column::Column::default();
        for (position, value) in values.iter_mut().enumerate() {
            column.entries.clear();
            column
                .entries
                .extend(parts.iter().map(|(weight, values)| column::Entry {
                    weight: *weight,
                    value: values[position],
                }));
            if let Some(found) = of_column(&mut column) {
                *value = found as f32;
            }
        }
        Ok(values)
    }

    fn check<'a>(
        &self,
        blocks: usize,
        adapters: &[ClientAdapter<'_>],
        copy: &'a [f32],
    ) -> Result<Copied<'a>, AverageError> {
        if adapters.is_empty() {
            return Err(AverageError::Empty);
        }
        let shape = &self.shape;
        let whole = shape.len(blocks, shape.rank());
        let least = shape
            .blocks(copy.len(), shape.rank())
            .and_then(|copied| blocks.checked_sub(copied))
            .ok_or(AverageError::LongCopy {
                length: copy.len(),
                whole,
            })?;
        if let Some(position) = copy.iter().position(|value| !value.is_finite()) {
            return Err(AverageError::CopyNotFinite { position });
        }
        for (index, adapter) in adapters.iter().enumerate() {
            let &ClientAdapter {
                rank,
                blocks: own,
                values,
                ..
            } = adapter;
            if !(1..=shape.rank()).contains(&rank) {
                return Err(AverageError::Rank {
                    index,
                    rank,
                    most: shape.rank(),
                });
            }
            if shape.blocks(values.len(), rank) != Some(own) {
                return Err(AverageError::PartOfBlock {
                    index,
                    length: values.len(),
                    rank,
                });
            }
            if !(least..=blocks).contains(&own) {
                return Err(AverageError::OutOfRange {
                    index,
                    length: values.len(),
                    least: shape.len(least, rank),
                    most: shape.len(blocks, rank),
                });
            }
            if let Some(position) = values.iter().position(|value| !value.is_finite()) {
                return Err(AverageError::NotFinite { index, position });
            }
        }
        total_weight(adapters.iter().map(|adapter| adapter.weight))?;
        Ok(Copied {
            values: copy,
            first: least,
            start: shape.len(least, shape.rank()),
        })
    }

    /// How far the mean, and the values that clients go on with if they are others, are from the exact products.
    fn errors<I: Iterator<Item = Product>>(
        &self,
        blocks: usize,
        adapters: &[ClientAdapter<'_>],
        products: impl Fn() -> I,
        mean: &[f32],
        values: Option<&[f32]>,
    ) -> Option<Errors> {
        let shape = &self.shape;
        let terms: usize = adapters.iter().map(|adapter| adapter.rank).sum::<usize>() + 2 * shape.rank();
        let sides = shape.len(blocks, 1) as f64;
        if (terms as f64).powi(2) * sides > MOST_WORK {
            return None;
        }
        let (mut whole, mut averaging, mut start) = (0.0, 0.0, 0.0);
        for (place, product) in shape.places(blocks, shape.rank()).zip(products()) {
            whole += product.norm().powi(2);
            averaging += less(product.clone(), mean, place).norm().powi(2);
            if let Some(values) = values {
                start += less(product, values, place).norm().powi(2);
            }
        }
        let share = |error: f64| match whole > 0.0 {
            true => (error / whole).sqrt(),
            false => 0.0,
        };
        Some(Errors {
            averaging: share(averaging),
            start: share(if values.is_some() { start } else { averaging }),
        })
    }

    /// What is impossible in `values` that were made from clients' of the same place, as means, trimmed means and medians are: none lies
    /// further from its `base` than training can have moved it, which `most` says of a base value.
    pub fn impossible_value(base: &[f32], values: &[f32], most: impl Fn(f32) -> f64) -> Option<String> {
        values.iter().zip(base).find_map(|(value, base)| {
            let (moved, most) = ((f64::from(*value) - f64::from(*base)).abs(), most(*base));
            (moved > most).then(|| {
                format!("{moved:.3e} from where the round began in one value, where it can be {most:.3e} at most")
            })
        })
    }

    /// Why a round cannot have come to this from `base`, if it cannot, when `most` is how far a value can have been trained from what
    /// it was. `is_narrow` says that clients may have smaller ranks.
    ///
    /// Of values that lie between the clients' none can have moved further than that. Of products,
    /// `‖BA − B₀A₀‖ ≤ ‖ΔB‖·‖A₀‖ + ‖B₀‖·‖ΔA‖ + ‖ΔB‖·‖ΔA‖` with the largest ΔA and ΔB, so their mean is no further; the nearest
    /// product of the run's rank is at most twice as far, since B₀A₀ is one of that rank. A smaller rank lacks at most ‖B₀‖·‖A₀‖.
    pub fn impossible(
        &self,
        blocks: usize,
        base: &[f32],
        (values, exact): (&[f32], Option<&Exact>),
        most: impl Fn(f32) -> f64,
        is_narrow: bool,
    ) -> Option<String> {
        let shape = &self.shape;
        if self.aggregation != Aggregation::Flora {
            let far = Self::impossible_value(base, values, &most);
            if far.is_some() {
                return far;
            }
        }
        let of_values = shape.places(blocks, shape.rank()).map(|place| (place, values, 2.0));
        let exact = exact.map(|exact| exact.places(shape).map(|place| (place, exact.values.as_slice(), 1.0)));
        let far = |(base_place, (place, values, factor)): (MatrixPlace, (MatrixPlace, &[f32], f64))| {
            let product = less(of(values, place), base, base_place);
            let norms = |range: std::ops::Range<usize>| {
                let values = base.get(range).unwrap_or_default().iter();
                let sum =
                    |part: &dyn Fn(f32) -> f64| values.clone().map(|value| part(*value).powi(2)).sum::<f64>().sqrt();
                (sum(&f64::from), sum(&|value| most(value)))
            };
            let (a, d_a) = norms(base_place.a..base_place.b);
            let (b, d_b) = norms(base_place.b..base_place.b + base_place.outputs * base_place.rank);
            let lacking = if is_narrow { a * b } else { 0.0 };
            let bound = factor * (d_b * a + b * d_a + d_b * d_a + lacking) + 1e-6 * a * b;
            let moved = product.norm();
            (moved > bound).then(|| {
                format!("{moved:.3e} from where the round began in one matrix, where it can be {bound:.3e} at most")
            })
        };
        let bases = || shape.places(blocks, shape.rank());
        let of_exact = || bases().zip(exact.into_iter().flatten()).find_map(far);
        match self.aggregation {
            Aggregation::Flora => bases().zip(of_values).find_map(far).or_else(of_exact),
            _ => of_exact(),
        }
    }
}

/// One matrix' product.
fn of(values: &[f32], place: MatrixPlace) -> Product {
    let mut product = Product::default();
    add(&mut product, 1.0, values, place);
    product
}

/// `product − B A`.
fn less(mut product: Product, values: &[f32], place: MatrixPlace) -> Product {
    add(&mut product, -1.0, values, place);
    product
}

fn add(product: &mut Product, weight: f64, values: &[f32], place: MatrixPlace) {
    let MatrixPlace {
        inputs,
        outputs,
        rank,
        a,
        b,
        ..
    } = place;
    if let (Some(a), Some(b)) = (values.get(a..a + rank * inputs), values.get(b..b + outputs * rank)) {
        product.add(weight, a, b, rank);
    }
}

/// `Σ_k w_k B_k A_k` of one matrix after the other.
struct Products<'a> {
    places: Vec<MatrixPlace>,
    next: usize,
    own: Vec<Vec<MatrixPlace>>,
    adapters: &'a [ClientAdapter<'a>],
    copied: Copied<'a>,
    total: f64,
}

impl<'a> Products<'a> {
    fn new(
        shape: &AdapterShape,
        blocks: usize,
        adapters: &'a [ClientAdapter<'a>],
        copied: Copied<'a>,
        total: f64,
    ) -> Self {
        Self {
            places: shape.places(blocks, shape.rank()).collect(),
            next: 0,
            own: (adapters.iter())
                .map(|adapter| shape.places(adapter.blocks, adapter.rank).collect())
                .collect(),
            adapters,
            copied,
            total,
        }
    }
}

impl Iterator for Products<'_> {
    type Item = Product;

    fn next(&mut self) -> Option<Product> {
        let place = *self.places.get(self.next)?;
        let mut product = Product::default();
        for (adapter, places) in self.adapters.iter().zip(&self.own) {
            if let Some(place) = places.get(self.next) {
                add(&mut product, adapter.weight as f64 / self.total, adapter.values, *place);
            }
        }
        if let Some(copied) = self.copied.of(place.block, self.adapters) {
            let place = MatrixPlace {
                a: place.a - copied.start,
                b: place.b - copied.start,
                ..place
            };
            add(&mut product, copied.weight as f64 / self.total, copied.values, place);
        }
        self.next += 1;
        Some(product)
    }
}

fn total_weight(weights: impl Iterator<Item = u64>) -> Result<u64, AverageError> {
    let mut total = 0_u64;
    for weight in weights {
        total = total.checked_add(weight).ok_or(AverageError::WeightOverflow)?;
    }
    match total {
        0 => Err(AverageError::ZeroWeight),
        total => Ok(total),
    }
}
