//! The cut and the rank with the shortest run, for all clients or for each of them.
//!
//! Separate because it is a search over what `knowledge` predicts: at measured rates, without a scenario.

use std::collections::BTreeMap;

use super::super::planner::ClientFacts;
use super::{Allocator, number};

/// Moves of single clients' cuts at most, and the relative difference below which two totals are the same.
const MOVES: usize = 1000;
const SAME: f64 = 1e-12;

/// Cuts in the clients' order and a rank, and what a run would take.
struct Found {
    total_s: f64,
    cuts: Vec<usize>,
    rank: usize,
}

impl Allocator {
    /// Cuts that a client's memory allows, shallowest first.
    fn fitting(&self, client: &ClientFacts, rank: usize) -> Result<Vec<usize>, String> {
        let run = self.run()?;
        let workload = run.workload();
        let fits = |split: &usize| {
            let needed = workload.client_memory_bytes(*split, rank, run.weights, run.training.wire);
            client.memory_bytes == 0 || needed <= client.memory_bytes as f64
        };
        let mut splits: Vec<usize> = (self.splits(run.blocks()).into_iter())
            .map(|split| split as usize)
            .filter(fits)
            .collect();
        splits.sort_unstable();
        Ok(splits)
    }

    /// Every client's cut and the rank with the shortest run that is found: from the best cut for all, and the deepest cuts
    /// within any limit on the backward pass, client by client to what is better.
    pub(super) fn shortest_per_client(
        &self,
        clients: &[ClientFacts],
        ranks: &[(u32, f64)],
    ) -> Result<(Vec<usize>, usize), String> {
        let mut best: Option<Found> = None;
        for &(rank, rounds) in ranks {
            let rank = rank as usize;
            let fitting = (clients.iter())
                .map(|client| self.fitting(client, rank))
                .collect::<Result<Vec<_>, _>>()?;
            // Of equals the first is taken: one cut for all.
            let one = self.shortest(clients, &[(number(rank), rounds)]);
            let mut candidates: Vec<Vec<usize>> = (one.into_iter()).map(|(cut, _)| vec![cut; clients.len()]).collect();
            candidates.extend(self.thresholds(clients, &fitting, rank)?);
            let mut found: Option<Found> = None;
            for cuts in candidates {
                let total_s = self.total_s(clients, &cuts, (rank, rounds))?;
                if found.as_ref().is_none_or(|found| total_s < found.total_s) {
                    found = Some(Found { total_s, cuts, rank });
                }
            }
            let Some(found) = found else { continue };
            let found = self.refined(clients, &fitting, found, rounds)?;
            if best.as_ref().is_none_or(|best| found.total_s < best.total_s) {
                best = Some(found);
            }
        }
        let Found { cuts, rank, .. } = best.ok_or_else(|| {
            "no cut fits the memory of some client; leave the smallest device out, or choose a smaller model".to_owned()
        })?;
        Ok((cuts, rank))
    }

    /// The deepest cut of every client within a limit on its backward pass, for every limit that matters.
    fn thresholds(
        &self,
        clients: &[ClientFacts],
        fitting: &[Vec<usize>],
        rank: usize,
    ) -> Result<Vec<Vec<usize>>, String> {
        let mut backward: Vec<BTreeMap<usize, f64>> = vec![BTreeMap::new(); clients.len()];
        for split in self.splits(self.run()?.blocks()) {
            let split = split as usize;
            let times = self.times(clients, &vec![split; clients.len()], rank)?;
            for (of_client, seconds) in backward.iter_mut().zip(times.phases.backward) {
                of_client.insert(split, seconds);
            }
        }
        let mut limits: Vec<f64> = backward
            .iter()
            .flat_map(|of_client| of_client.values().copied())
            .collect();
        limits.sort_by(f64::total_cmp);
        limits.dedup();
        let within = |limit: f64| -> Option<Vec<usize>> {
            (fitting.iter().zip(&backward))
                .map(|(fitting, backward)| {
                    let quick = |split: &usize| backward.get(split).is_some_and(|seconds| *seconds <= limit);
                    fitting.iter().copied().filter(quick).max()
                })
                .collect()
        };
        Ok(limits.into_iter().filter_map(within).collect())
    }

    /// Moves one client's cut by one or two places as long as that shortens the run.
    fn refined(
        &self,
        clients: &[ClientFacts],
        fitting: &[Vec<usize>],
        mut best: Found,
        rounds: f64,
    ) -> Result<Found, String> {
        'moved: for _ in 0..MOVES {
            for (client, fitting) in fitting.iter().enumerate() {
                let Some(place) = fitting.iter().position(|split| *split == best.cuts[client]) else {
                    continue;
                };
                for change in [-1_isize, 1, -2, 2] {
                    let Some(&split) = place.checked_add_signed(change).and_then(|place| fitting.get(place)) else {
                        continue;
                    };
                    let mut cuts = best.cuts.clone();
                    cuts[client] = split;
                    let total_s = self.total_s(clients, &cuts, (best.rank, rounds))?;
                    if total_s < best.total_s * (1.0 - SAME) {
                        (best.total_s, best.cuts) = (total_s, cuts);
                        continue 'moved;
                    }
                }
            }
            break;
        }
        Ok(best)
    }

    /// The cut and rank with the shortest run at the rates there are.
    pub(super) fn shortest(&self, clients: &[ClientFacts], ranks: &[(u32, f64)]) -> Result<(usize, usize), String> {
        let mut fitting = Vec::with_capacity(ranks.len());
        for &(rank, rounds) in ranks {
            let of_clients = clients.iter().map(|client| self.fitting(client, rank as usize));
            fitting.push((rank as usize, rounds, of_clients.collect::<Result<Vec<_>, _>>()?));
        }
        let mut best: Option<(f64, usize, usize)> = None;
        for split in self.splits(self.run()?.blocks()) {
            for &(rank, rounds, ref fitting) in &fitting {
                let split = split as usize;
                if !fitting.iter().all(|fitting| fitting.contains(&split)) {
                    continue;
                }
                let total = self.total_s(clients, &vec![split; clients.len()], (rank, rounds))?;
                if best.is_none_or(|(least, ..)| total < least) {
                    best = Some((total, split, rank));
                }
            }
        }
        let (_, split, rank) = best.ok_or_else(|| {
            "no cut fits the memory of all clients; leave the smallest device out, or choose a smaller model".to_owned()
        })?;
        Ok((split, rank))
    }
}
