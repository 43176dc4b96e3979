//! Who holds which blocks of the client side, as a value.
//!
//! Separate because everything that differs between cuts, adapters' lengths, assignments and digests, is derived here, and from
//! nothing else.

use std::collections::{BTreeMap, BTreeSet};

use super::super::message::{Assignment, Digest};
use crate::federated::Rule;
use crate::terms::ids::ClientId;
use crate::terms::moments::Moments;

/// Who holds which blocks, and in which state they come to the clients.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// What clients at the largest cut get, and others the beginning of; its number is set by the session.
    pub assignment: Assignment,
    /// The client side's adapter, flat.
    pub adapter: Vec<f32>,
    /// Moments of the blocks that clients did not hold before, the last of theirs; `None` where they start anew.
    pub moments: Option<Moments>,
    /// Clients' own cuts, up to the assignment's. Without any that is everybody's; else who has none gets the smallest.
    pub cuts: BTreeMap<ClientId, u32>,
    /// How adapters are aggregated; `None` is the mean of adapters of one rank.
    pub rule: Option<Rule>,
    /// Clients' own ranks, up to the assignment's, in turn by their numbers. Without any that is everybody's. Only with a rule.
    pub ranks: Vec<u32>,
}

/// What of the client side a client has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Part {
    pub split: u32,
    pub rank: u32,
}

impl Placement {
    /// One cut for everybody and the mean, from the beginning: the assignment's, whose `adapter_len` becomes the length of `adapter`.
    pub fn new(assignment: Assignment, adapter: Vec<f32>) -> Placement {
        Placement {
            assignment: Assignment {
                adapter_len: adapter.len() as u64,
                ..assignment
            },
            adapter,
            moments: None,
            cuts: BTreeMap::new(),
            rule: None,
            ranks: Vec::new(),
        }
    }

    /// Blocks below the main server's: the smallest cut.
    pub fn split(&self) -> u32 {
        self.cuts
            .values()
            .copied()
            .min()
            .unwrap_or(self.assignment.config.split)
    }

    /// Blocks of this client.
    pub(crate) fn split_of(&self, client: ClientId) -> u32 {
        self.cuts.get(&client).copied().unwrap_or_else(|| self.split())
    }

    /// What this client has.
    pub(super) fn part_of(&self, client: ClientId) -> Part {
        let turn = match self.ranks.len() as u64 {
            0 => None,
            ranks => self.ranks.get((client.0.wrapping_sub(1) % ranks) as usize),
        };
        Part {
            split: self.split_of(client),
            rank: turn.copied().unwrap_or(self.assignment.config.rank),
        }
    }

    /// Values of one block's adapter.
    pub(super) fn block_len(&self) -> u64 {
        self.assignment.adapter_len / u64::from(self.assignment.config.split.max(1))
    }

    /// Values in so many blocks' adapters.
    pub(super) fn len_at(&self, split: u32) -> u64 {
        u64::from(split) * self.block_len()
    }

    /// Values of the blocks that some clients may have and the main server has too.
    pub(super) fn copy_len(&self) -> usize {
        let len = usize::try_from(self.len_at(self.split())).unwrap_or(usize::MAX);
        self.adapter.len().saturating_sub(len)
    }

    /// The adapter of a client that has this part.
    pub(super) fn adapter_at(&self, part: Part) -> Vec<f32> {
        match &self.rule {
            Some(rule) if self.is_narrow(part) => {
                rule.shape()
                    .narrow(&self.adapter, part.split as usize, part.rank as usize)
            }
            _ => {
                let len = usize::try_from(self.len_at(part.split)).unwrap_or(usize::MAX);
                self.adapter.get(..len).unwrap_or(&self.adapter).to_vec()
            }
        }
    }

    /// Values in it.
    pub(super) fn len_of(&self, part: Part) -> u64 {
        match &self.rule {
            Some(rule) if self.is_narrow(part) => rule.shape().len(part.split as usize, part.rank as usize) as u64,
            _ => self.len_at(part.split),
        }
    }

    /// Whether this is a smaller rank than the run's.
    pub(super) fn is_narrow(&self, part: Part) -> bool {
        part.rank != self.assignment.config.rank
    }

    pub(super) fn assignment_of(&self, client: ClientId) -> Assignment {
        let part = self.part_of(client);
        let mut assignment = self.assignment.clone();
        // The embedding comes before the blocks.
        assignment.weights.truncate(part.split as usize + 1);
        assignment.adapter_len = self.len_of(part);
        assignment.config.split = part.split;
        if self.is_narrow(part) {
            // The same scale: it is alpha / rank.
            let share = part.rank as f32 / self.assignment.config.rank as f32;
            assignment.config.rank = part.rank;
            assignment.config.alpha *= share;
            assignment.alphas.iter_mut().for_each(|own| own.alpha *= share);
        }
        assignment
    }

    /// Digests of the clients' adapters.
    fn bases(&self) -> BTreeMap<Part, Digest> {
        let splits: BTreeSet<u32> = self.cuts.values().copied().chain([self.split()]).collect();
        let ranks: BTreeSet<u32> = match self.ranks[..] {
            [] => BTreeSet::from([self.assignment.config.rank]),
            ref ranks => ranks.iter().copied().collect(),
        };
        (splits.into_iter())
            .flat_map(|split| ranks.iter().map(move |&rank| Part { split, rank }))
            .map(|part| (part, Digest::of_values(&self.adapter_at(part))))
            .collect()
    }
}

/// The placement that holds, with the digests of what clients start a round from.
pub(super) struct Current {
    placement: Placement,
    /// Digests of the adapters that clients start the next round from.
    bases: BTreeMap<Part, Digest>,
}

impl Current {
    pub fn new(placement: Placement) -> Current {
        Current {
            bases: placement.bases(),
            placement,
        }
    }

    /// Takes another placement's place, and the next number.
    pub fn replace(&mut self, mut placement: Placement) {
        placement.assignment.number = self.placement.assignment.number.wrapping_add(1);
        *self = Current::new(placement);
    }

    /// Makes an average the adapter that clients start from.
    pub fn install(&mut self, average: &[f32]) {
        self.placement.adapter.clear();
        self.placement.adapter.extend_from_slice(average);
        self.bases = self.placement.bases();
    }

    /// Forgets the moments: whoever comes later did not hold these blocks when they were moved.
    pub(crate) fn forget_moments(&mut self) {
        self.placement.moments = None;
    }

    /// Digest of the adapter that a client with this part starts from; `None` when no client has it.
    pub(super) fn base_at(&self, part: Part) -> Option<Digest> {
        self.bases.get(&part).copied()
    }
}

impl std::ops::Deref for Current {
    type Target = Placement;

    fn deref(&self) -> &Placement {
        &self.placement
    }
}
