//! Ways to aggregate adapters, against products of dense matrices in f64.

use proptest::prelude::*;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sflllm::federated::{Aggregate, AverageError, ClientAdapter, Exact, Rule, trimmed_at_each_end, weighted_mean};
use sflllm::terms::adapter::{AdapterShape, MatrixShape, Trained};
use sflllm::terms::aggregation::Aggregation;
use sflllm::terms::moments::MomentPolicy;

/// Sides of the matrices of a block that nothing divides.
const MATRICES: [(u32, u32); 2] = [(37, 53), (29, 23)];

fn shape(rank: usize, trained: Trained) -> AdapterShape {
    let matrices = MATRICES.map(|(inputs, outputs)| MatrixShape { inputs, outputs });
    AdapterShape::new(rank, trained, matrices.to_vec()).unwrap()
}

fn rule(aggregation: Aggregation, rank: usize) -> Rule {
    Rule::new(aggregation, shape(rank, aggregation.trained())).unwrap()
}

fn numbers(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    let number = |_| (rng.next_u32() as f32 / u32::MAX as f32) * 2.0 - 1.0;
    (0..count).map(number).collect()
}

/// A client: its examples, its blocks, its rank.
type Client = (u64, usize, usize);

/// Random adapters of these clients.
fn adapters(seed: u64, shape: &AdapterShape, clients: &[Client]) -> Vec<Vec<f32>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let one = |&(_, blocks, rank): &Client| numbers(&mut rng, shape.len(blocks, rank));
    clients.iter().map(one).collect()
}

fn given<'a>(clients: &[Client], adapters: &'a [Vec<f32>]) -> Vec<ClientAdapter<'a>> {
    (clients.iter().zip(adapters))
        .map(|(&(weight, blocks, rank), values)| ClientAdapter {
            weight,
            blocks,
            rank,
            values,
        })
        .collect()
}

/// `B A` of every matrix, dense.
fn products(shape: &AdapterShape, values: &[f32], blocks: usize, rank: usize) -> Vec<Vec<f64>> {
    let product = |place: sflllm::terms::adapter::MatrixPlace| {
        let a = &values[place.a..place.b];
        let b = &values[place.b..place.b + place.outputs * rank];
        dense(a, b, rank)
    };
    shape.places(blocks, rank).map(product).collect()
}

fn dense(a: &[f32], b: &[f32], rank: usize) -> Vec<f64> {
    let inputs = a.len() / rank;
    let mut dense = Vec::with_capacity(b.len() / rank * inputs);
    for row in b.chunks_exact(rank) {
        for input in 0..inputs {
            let terms = row.iter().enumerate();
            dense.push(
                terms
                    .map(|(j, b)| f64::from(*b) * f64::from(a[j * inputs + input]))
                    .sum(),
            );
        }
    }
    dense
}

fn exact_products(shape: &AdapterShape, exact: &Exact) -> Vec<Vec<f64>> {
    let mut at = 0;
    let mut products = Vec::new();
    for (&rank, matrix) in exact.ranks.iter().zip(shape.matrices().iter().cycle()) {
        let (inputs, outputs, rank) = (matrix.inputs as usize, matrix.outputs as usize, rank as usize);
        let b = at + inputs * rank;
        let end = b + outputs * rank;
        products.push(match rank {
            0 => vec![0.0; inputs * outputs],
            _ => dense(&exact.values[at..b], &exact.values[b..end], rank),
        });
        at = end;
    }
    assert_eq!(at, exact.values.len());
    products
}

/// The weighted mean of the clients' products; for a block that some do not hold, with those of the copy.
fn mean_of_products(
    shape: &AdapterShape,
    blocks: usize,
    clients: &[Client],
    adapters: &[Vec<f32>],
    copy: &[f32],
) -> Vec<Vec<f64>> {
    let total: u64 = clients.iter().map(|(weight, ..)| weight).sum();
    let copied = copy.len() / shape.block_len(shape.rank());
    let of_copy = products(shape, copy, copied, shape.rank());
    let mut sums: Vec<Vec<f64>> = (0..blocks)
        .flat_map(|_| MATRICES.map(|(inputs, outputs)| vec![0.0; (inputs * outputs) as usize]))
        .collect();
    for (&(weight, own, rank), values) in clients.iter().zip(adapters) {
        let mut theirs = products(shape, values, own, rank);
        let missing = of_copy.len() - (sums.len() - theirs.len());
        theirs.extend(of_copy[missing..].iter().cloned());
        for (sum, product) in sums.iter_mut().zip(theirs) {
            for (sum, value) in sum.iter_mut().zip(product) {
                *sum += weight as f64 / total as f64 * value;
            }
        }
    }
    sums
}

fn norm<'a>(matrices: impl IntoIterator<Item = &'a Vec<f64>>) -> f64 {
    matrices
        .into_iter()
        .flatten()
        .map(|value| value * value)
        .sum::<f64>()
        .sqrt()
}

fn difference(found: &[Vec<f64>], expected: &[Vec<f64>]) -> Vec<Vec<f64>> {
    assert_eq!(found.len(), expected.len());
    let less = |(found, expected): (&Vec<f64>, &Vec<f64>)| {
        assert_eq!(found.len(), expected.len());
        found
            .iter()
            .zip(expected)
            .map(|(found, expected)| found - expected)
            .collect()
    };
    found.iter().zip(expected).map(less).collect()
}

/// Up to four clients with ranks of 4, 8 and 16 and one to three blocks, of which one at least is all.
fn clients() -> impl Strategy<Value = Vec<Client>> {
    let client = (1_u64..100, 1_usize..=3, prop::sample::select(vec![4_usize, 8, 16]));
    prop::collection::vec(client, 1..5)
}

/// What is aggregated, and the dense mean.
fn case(seed: u64, aggregation: Aggregation, clients: &[Client]) -> (Aggregate, Vec<Vec<f64>>) {
    let rule = rule(aggregation, 16);
    let shape = rule.shape();
    let adapters = adapters(seed, shape, clients);
    let least = clients.iter().map(|(_, blocks, _)| *blocks).min().unwrap();
    let copy = numbers(&mut ChaCha8Rng::seed_from_u64(!seed), shape.len(3 - least, 16));
    let aggregate = rule.aggregate(3, &[], &given(clients, &adapters), &copy).unwrap();
    let expected = mean_of_products(shape, 3, clients, &adapters, &copy);
    (aggregate, expected)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn flora_and_fedex_keep_the_weighted_mean_of_the_products(seed: u64, clients in clients()) {
        for aggregation in [Aggregation::Flora, Aggregation::Fedex] {
            let (aggregate, expected) = case(seed, aggregation, &clients);
            let rule = rule(aggregation, 16);
            let exact = aggregate.exact.unwrap();
            prop_assert_eq!(exact.fault(rule.shape(), 3), None);
            let found = exact_products(rule.shape(), &exact);
            for (found, expected) in found.iter().zip(&expected) {
                let off = difference(std::slice::from_ref(found), std::slice::from_ref(expected));
                let off = norm(&off) / norm([expected]);
                prop_assert!(off < 1e-6, "{aggregation}: off by {off:e}");
            }
        }
    }

    #[test]
    fn what_averages_miss_is_told(seed: u64, clients in clients()) {
        for aggregation in [Aggregation::Mean, Aggregation::Median, Aggregation::Fedex, Aggregation::Flora] {
            let (aggregate, expected) = case(seed, aggregation, &clients);
            let errors = aggregate.errors.unwrap();
            let shape = shape(16, Trained::Both);
            let start = difference(&products(&shape, &aggregate.values, 3, 16), &expected);
            let start = norm(&start) / norm(&expected);
            prop_assert!((errors.start - start).abs() < 1e-6, "{aggregation}: {} and {start}", errors.start);
            let (mean, _) = case(seed, Aggregation::Mean, &clients);
            prop_assert_eq!(errors.averaging, mean.errors.unwrap().averaging);
            if aggregation == Aggregation::Flora {
                // No adapter of the run's rank is nearer.
                prop_assert!(errors.start <= errors.averaging + 1e-6);
            }
        }
    }

    #[test]
    fn with_frozen_a_the_mean_of_b_is_the_mean_of_the_products(seed: u64, clients in clients()) {
        let rule = rule(Aggregation::Ffa, 16);
        let adapters = adapters(seed, rule.shape(), &clients);
        let least = clients.iter().map(|(_, blocks, _)| *blocks).min().unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(!seed);
        let copy = numbers(&mut rng, rule.shape().len(3 - least, 16));
        let aggregate = rule.aggregate(3, &[], &given(&clients, &adapters), &copy).unwrap();
        prop_assert_eq!(aggregate.errors.unwrap().start, 0.0);
        // With everybody's A put in, it is the mean of whole adapters' products.
        let both = shape(16, Trained::Both);
        let frozen = numbers(&mut rng, both.len(3, 16));
        let whole = |values: &[f32], blocks, rank| {
            let mut whole = both.narrow(&frozen, blocks, rank);
            let b = rule.shape().places(blocks, rank);
            for (to, from) in both.places(blocks, rank).zip(b) {
                let len = rank * from.outputs;
                whole[to.b..to.b + len].copy_from_slice(&values[from.b..from.b + len]);
            }
            whole
        };
        let with_a: Vec<Vec<f32>> = (clients.iter().zip(&adapters))
            .map(|(&(_, blocks, rank), values)| whole(values, blocks, rank))
            .collect();
        // The copy is of the last blocks, whose A is theirs.
        let padded = [vec![0.0; rule.shape().len(least, 16)], copy].concat();
        let copy = whole(&padded, 3, 16).split_off(both.len(least, 16));
        let expected = mean_of_products(&both, 3, &clients, &with_a, &copy);
        let off = norm(&difference(&products(&both, &whole(&aggregate.values, 3, 16), 3, 16), &expected));
        prop_assert!(off < 1e-6 * norm(&expected), "off by {off:e}");
    }

    #[test]
    fn liars_move_no_value_out_of_the_honest_range(
        seed: u64,
        honest in 2_usize..6,
        lies in prop::collection::vec(prop::sample::select(vec![0.0, 1e30, -1e30, 3.4e38, -5.0]), 1..3),
    ) {
        let clients: Vec<Client> = vec![(10, 2, 4); honest + lies.len()];
        let shape = shape(4, Trained::Both);
        let mut adapters = adapters(seed, &shape, &clients);
        let mut clients = clients;
        for (index, lie) in lies.iter().enumerate() {
            // They lie first, of their examples too.
            adapters[index].fill(*lie);
            clients[index].0 = 1_000_000;
        }
        let liars = lies.len();
        for (aggregation, most) in [
            (Aggregation::Trimmed, trimmed_at_each_end(clients.len())),
            (Aggregation::Median, clients.len().div_ceil(2) - 1),
        ] {
            if liars > most {
                continue;
            }
            let found = rule(aggregation, 4).aggregate(2, &[], &given(&clients, &adapters), &[]).unwrap();
            for (position, value) in found.values.iter().enumerate() {
                let column = adapters[liars..].iter().map(|values| values[position]);
                let (low, high) = column.fold((f32::MAX, f32::MIN), |(low, high), one| (low.min(one), high.max(one)));
                prop_assert!((low..=high).contains(value), "{aggregation}: {low} <= {value} <= {high}");
            }
        }
    }

    #[test]
    fn a_narrow_client_has_no_say_in_rows_that_it_does_not_have_and_counts_as_zero_in_columns(seed: u64, clients in clients()) {
        // All but the last have the whole rank: beyond its rank the mean of A is that of the others, bit for bit.
        let mut clients: Vec<Client> = clients.into_iter().map(|(weight, _, _)| (weight, 3, 16)).collect();
        let (others, _) = case(seed, Aggregation::Mean, &clients);
        let whole = shape(16, Trained::Both);
        let adapters = adapters(seed, &whole, &clients);
        let flat: Vec<(u64, &[f32])> =
            clients.iter().zip(&adapters).map(|((weight, ..), values)| (*weight, values.as_slice())).collect();
        prop_assert_eq!(weighted_mean(&flat).unwrap(), others.values.as_slice());
        clients.push((50, 3, 4));
        let (with, _) = case(seed, Aggregation::Mean, &clients);
        for place in whole.places(3, 16) {
            let beyond = place.a + 4 * place.inputs..place.b;
            prop_assert_eq!(&with.values[beyond.clone()], &others.values[beyond]);
            prop_assert_ne!(with.values[place.a], others.values[place.a]);
            let b = place.b..place.b + 16 * place.outputs;
            for (with, others) in with.values[b.clone()].chunks_exact(16).zip(others.values[b].chunks_exact(16)) {
                let total: u64 = clients.iter().map(|(weight, ..)| weight).sum();
                for (with, others) in with[4..].iter().zip(&others[4..]) {
                    let expected = others * (total - 50) as f32 / total as f32;
                    prop_assert!((with - expected).abs() <= 1e-6, "{with}, not {expected}");
                }
                prop_assert_ne!(with[0], others[0]);
            }
        }
    }
}

/// An adapter of one block whose values are all the same.
fn constant(shape: &AdapterShape, rank: usize, value: f32) -> Vec<f32> {
    vec![value; shape.len(1, rank)]
}

#[test]
fn rows_of_a_are_averaged_over_those_who_have_them_and_columns_of_b_over_all() {
    let rule = rule(Aggregation::Mean, 3);
    let shape = rule.shape();
    let clients = [(1, 1, 1), (3, 1, 2)];
    let adapters = [constant(shape, 1, 8.0), constant(shape, 2, 4.0)];
    let base = constant(shape, 3, -1.0);
    let found = rule.aggregate(1, &base, &given(&clients, &adapters), &[]).unwrap();
    for place in shape.places(1, 3) {
        let rows: Vec<f32> = found.values[place.a..place.b]
            .chunks_exact(place.inputs)
            .map(|row| row[0])
            .collect();
        assert_eq!(rows, [5.0, 4.0, -1.0]);
        // The column that the first client does not have is zero in its product; what nobody has stays.
        assert_eq!(found.values[place.b..place.b + 3], [5.0, 3.0, -1.0]);
    }
}

#[test]
fn nobody_can_lie_alone_where_the_mean_can_be_bought() {
    let clients = [(1, 1, 4), (1, 1, 4), (1_000, 1, 4)];
    let shape = shape(4, Trained::Both);
    let adapters = [1.0, 2.0, 1e6].map(|value| constant(&shape, 4, value));
    let first = |aggregation| {
        let found = rule(aggregation, 4).aggregate(1, &[], &given(&clients, &adapters), &[]);
        found.unwrap().values[0]
    };
    assert!(first(Aggregation::Mean) > 9e5);
    assert_eq!(first(Aggregation::Median), 2.0);
    assert_eq!(first(Aggregation::Trimmed), 2.0);
}

#[test]
fn the_servers_copy_counts_for_everybody_it_stands_for() {
    // Three clients with one block, one with two: in the second the copy has three voices of four.
    let shape = shape(4, Trained::Both);
    let clients = [(1, 1, 4), (1, 1, 4), (1, 1, 4), (1, 2, 4)];
    let adapters: Vec<Vec<f32>> = clients
        .iter()
        .map(|(_, blocks, _)| vec![10.0; shape.len(*blocks, 4)])
        .collect();
    let copy = constant(&shape, 4, 2.0);
    for (aggregation, expected) in [
        (Aggregation::Median, 2.0),
        (Aggregation::Trimmed, 2.0),
        (Aggregation::Mean, 4.0),
    ] {
        let found = rule(aggregation, 4)
            .aggregate(2, &[], &given(&clients, &adapters), &copy)
            .unwrap();
        let (first, second) = found.values.split_at(shape.len(1, 4));
        assert_eq!((first[0], second[0]), (10.0, expected), "{aggregation}");
    }
}

#[test]
fn a_component_that_is_zero_can_still_be_trained() {
    // B zero, as at the beginning: no product has any component, and A must stay.
    let rule = rule(Aggregation::Flora, 4);
    let mut adapters = adapters(5, rule.shape(), &[(1, 1, 4), (2, 1, 4)]);
    for place in rule.shape().places(1, 4) {
        for adapter in &mut adapters {
            adapter[place.b..place.b + place.outputs * 4].fill(0.0);
        }
    }
    let found = rule
        .aggregate(1, &[], &given(&[(1, 1, 4), (2, 1, 4)], &adapters), &[])
        .unwrap();
    let mean = weighted_mean(&[(1, &adapters[0]), (2, &adapters[1])]).unwrap();
    assert_eq!(found.values, mean);
    let exact = found.exact.unwrap();
    assert_eq!((exact.ranks, exact.values.len()), (vec![0, 0], 0));
    assert_eq!(found.errors.unwrap().start, 0.0);
}

#[test]
fn one_client_alone_goes_on_with_what_its_adapter_does() {
    for aggregation in Aggregation::ALL
        .iter()
        .copied()
        .filter(|one| one.trained() == Trained::Both)
    {
        let (aggregate, expected) = case(11, aggregation, &[(5, 3, 16)]);
        let found = products(&shape(16, Trained::Both), &aggregate.values, 3, 16);
        assert!(
            norm(&difference(&found, &expected)) < 1e-6 * norm(&expected),
            "{aggregation}"
        );
    }
}

#[test]
fn a_client_of_a_smaller_rank_gets_the_nearest_of_its_rank() {
    let (aggregate, expected) = case(3, Aggregation::Flora, &[(3, 3, 16), (4, 3, 8), (2, 3, 4)]);
    let whole = shape(16, Trained::Both);
    let off = |rank: usize| {
        let narrow = whole.narrow(&aggregate.values, 3, rank);
        norm(&difference(&products(&whole, &narrow, 3, rank), &expected))
    };
    // What the larger rank has more is at right angles to what the smaller has: Pythagoras.
    let narrow = whole.narrow(&aggregate.values, 3, 4);
    let kept = norm(&products(&whole, &narrow, 3, 4));
    let all = norm(&expected);
    assert!((off(4).powi(2) + kept.powi(2) - all.powi(2)).abs() < 1e-6 * all.powi(2));
    assert!(off(16) < off(8) && off(8) < off(4) && off(4) < all);
}

#[test]
fn what_cannot_be_aggregated_is_named() {
    let rule = rule(Aggregation::Mean, 4);
    let shape = rule.shape();
    let whole = shape.len(1, 4);
    let error = |clients: &[Client], adapters: &[Vec<f32>], copy: &[f32]| {
        rule.aggregate(1, &[], &given(clients, adapters), copy).unwrap_err()
    };
    assert_eq!(error(&[], &[], &[]), AverageError::Empty);
    let good = constant(shape, 4, 1.0);
    let short = vec![1.0; whole - 1];
    let (index, rank) = (1, 4);
    assert_eq!(
        error(&[(1, 1, 4), (1, 1, 4)], &[good.clone(), short], &[]),
        AverageError::PartOfBlock {
            index,
            length: whole - 1,
            rank
        }
    );
    assert_eq!(
        error(&[(1, 1, 4), (1, 1, 5)], &[good.clone(), constant(shape, 5, 1.0)], &[]),
        AverageError::Rank {
            index,
            rank: 5,
            most: 4
        }
    );
    let twice = [good.clone(), good.clone()].concat();
    let (least, most) = (whole, whole);
    let length = 2 * whole;
    let index = 0;
    assert_eq!(
        error(&[(1, 2, 4)], &[twice], &[]),
        AverageError::OutOfRange {
            index,
            length,
            least,
            most
        }
    );
    let mut wild = good.clone();
    wild[3] = f32::NAN;
    assert_eq!(
        error(&[(1, 1, 4)], &[wild], &[]),
        AverageError::NotFinite { index, position: 3 }
    );
    assert_eq!(
        error(&[(0, 1, 4)], std::slice::from_ref(&good), &[]),
        AverageError::ZeroWeight
    );
    assert_eq!(
        error(&[(u64::MAX, 1, 4), (1, 1, 4)], &[good.clone(), good.clone()], &[]),
        AverageError::WeightOverflow
    );
    assert_eq!(
        error(&[(1, 1, 4)], &[good], &[0.0]),
        AverageError::LongCopy { length: 1, whole }
    );
    assert!(Rule::new(Aggregation::Ffa, shape.clone()).is_none());
}

#[test]
fn exact_products_from_elsewhere_are_checked() {
    let (aggregate, _) = case(1, Aggregation::Flora, &[(1, 3, 4), (1, 3, 4)]);
    let good = aggregate.exact.unwrap();
    let shape = shape(16, Trained::Both);
    assert_eq!(good.fault(&shape, 3), None);
    let fault = |change: &dyn Fn(&mut Exact)| {
        let mut exact = good.clone();
        change(&mut exact);
        exact.fault(&shape, 3).unwrap()
    };
    assert!(fault(&|exact| exact.ranks.truncate(5)).contains("5 ranks of 6"));
    assert!(fault(&|exact| exact.ranks[1] = 24).contains("rank 24 of a matrix of 29 by 23"));
    assert!(fault(&|exact| exact.values.truncate(9)).contains("9 values"));
    assert!(fault(&|exact| exact.values[4] = f32::INFINITY).contains("value 4"));
}

#[test]
fn a_round_that_moves_further_than_training_can_is_told_from_one_that_does_not() {
    let most = |_: f32| 0.25;
    for aggregation in [Aggregation::Mean, Aggregation::Flora, Aggregation::Fedex] {
        let rule = rule(aggregation, 4);
        let shape = rule.shape();
        let clients: [Client; 3] = [(3, 2, 4), (2, 2, 4), (1, 2, 4)];
        let base = numbers(&mut ChaCha8Rng::seed_from_u64(8), shape.len(2, 4));
        let moved = |factor: f32| -> Vec<Vec<f32>> {
            let steps = adapters(9, shape, &clients);
            let moved = |step: &Vec<f32>| base.iter().zip(step).map(|(base, step)| base + factor * step).collect();
            steps.iter().map(moved).collect()
        };
        let found = |adapters: &[Vec<f32>], rule: &Rule| {
            let found = rule.aggregate(2, &base, &given(&clients, adapters), &[]).unwrap();
            rule.impossible(2, &base, (&found.values, found.exact.as_ref()), most, false)
        };
        assert_eq!(found(&moved(0.25), &rule), None, "{aggregation}");
        let reason = found(&moved(50.0), &rule).unwrap();
        assert!(reason.contains("from where the round began"), "{reason}");
    }
}

#[test]
fn moments_go_the_way_of_their_values() {
    let parts: [(u64, &[f32]); 3] = [(1, &[1.0, 0.0]), (1, &[2.0, 0.0]), (2, &[6.0, 4.0])];
    for (aggregation, expected) in [
        (Aggregation::Mean, [3.75, 2.0]),
        (Aggregation::Fedex, [3.75, 2.0]),
        (Aggregation::Ffa, [3.75, 2.0]),
        (Aggregation::Median, [2.0, 0.0]),
        (Aggregation::Trimmed, [2.0, 0.0]),
        (Aggregation::Flora, [0.0, 0.0]),
    ] {
        assert_eq!(rule(aggregation, 4).moments(&parts).unwrap(), expected, "{aggregation}");
    }
    assert_eq!(Aggregation::Flora.moments(), MomentPolicy::Reset);
    assert_eq!(Aggregation::Fedex.moments(), MomentPolicy::Keep);
}
