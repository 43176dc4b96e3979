//! One round: what its members start from, what they may send, and what that comes to.
//!
//! Separate because it is a value without connections: what is checked of an update, and how updates are averaged.

use std::collections::BTreeMap;
use std::time::Duration;

use super::super::message::*;
use crate::federated::{Aggregate, ClientAdapter, Rule, mean_of_prefixes, weighted_mean};
use crate::terms::ids::{ClientId, RoundKey};
use crate::terms::moments::Moments;

pub(super) struct Update {
    pub examples: u64,
    pub values: Vec<f32>,
    pub moments: Option<Moments>,
    /// Of its frame.
    pub bytes: u64,
}

/// What a member of the open round starts from, and what has come of it.
pub(super) struct Participant {
    pub base: Digest,
    pub adapter_len: u64,
    /// Where it is smaller than the run's.
    pub rank: Option<u32>,
    pub update: Option<Update>,
}

/// What comes with the adapters, and stands in for what some lack.
pub(super) struct Asked {
    pub moments: Option<Leaving>,
    pub copy: Vec<f32>,
}

/// The last round, for members that did not hear of it.
pub(super) struct Closed {
    pub told: RoundClosed,
    rule: Option<Rule>,
    /// What of the average those have who are in it.
    pub parts: BTreeMap<ClientId, Part>,
}

impl Closed {
    /// What one of those has of the average.
    pub fn part_of(&self, part: Part, average: &[f32]) -> Vec<f32> {
        part.of(self.rule.as_ref(), average)
    }
}

/// What of the round's adapter a member has: so many numbers, at a rank of its own where it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Part {
    pub len: usize,
    rank: Option<usize>,
}

impl Part {
    /// Of values of the whole; those that there are, where they are fewer.
    pub fn of(self, rule: Option<&Rule>, whole: &[f32]) -> Vec<f32> {
        let narrow = rule.zip(self.rank).and_then(|(rule, rank)| {
            let blocks = rule.shape().blocks(self.len, rank)?;
            Some(rule.shape().narrow(whole, blocks, rank))
        });
        narrow.unwrap_or_else(|| whole.get(..self.len).unwrap_or(whole).to_vec())
    }
}

impl Participant {
    pub fn part(&self) -> Part {
        Part {
            len: usize::try_from(self.adapter_len).unwrap_or(usize::MAX),
            rank: self.rank.map(|rank| usize::try_from(rank).unwrap_or(usize::MAX)),
        }
    }
}

/// A round that adapters may come for.
pub(super) struct OpenRound {
    pub round: RoundKey,
    /// `None` is the mean.
    pub rule: Option<Rule>,
    /// Of the average.
    pub adapter_len: u64,
    pub max_examples: u64,
    /// Once members have been asked for their adapters.
    pub asked: Option<Asked>,
    pub opened: Duration,
    pub members: BTreeMap<ClientId, Participant>,
    pub excluded: Vec<Exclusion>,
}

impl OpenRound {
    /// Why the main server cannot mean this round, if it cannot: members' adapters are prefixes of the average, or so many of its
    /// blocks at a rank of their own.
    pub(crate) fn contradiction(&self) -> Option<String> {
        match &self.rule {
            Some(rule) => {
                let shape = rule.shape();
                let blocks = |len: u64, rank| shape.blocks(usize::try_from(len).ok()?, rank);
                let Some(whole) = blocks(self.adapter_len, shape.rank()) else {
                    return Some(format!(
                        "an average of {} values, which is no whole number of blocks",
                        self.adapter_len
                    ));
                };
                let odd = |(_, member): &(&ClientId, &Participant)| {
                    let rank = member
                        .rank
                        .map_or(shape.rank(), |rank| usize::try_from(rank).unwrap_or(usize::MAX));
                    !(1..=shape.rank()).contains(&rank)
                        || blocks(member.adapter_len, rank).is_none_or(|blocks| blocks > whole)
                };
                if let Some((client, member)) = self.members.iter().find(odd) {
                    return Some(format!(
                        "{client} has an adapter of {} values, which are not the first blocks of the average of {}",
                        member.adapter_len, self.adapter_len
                    ));
                }
            }
            None => {
                if let Some((client, _)) = self.members.iter().find(|(_, member)| member.rank.is_some()) {
                    return Some(format!(
                        "{client} has a rank of its own, of an adapter whose shape was not told"
                    ));
                }
            }
        }

        let longer = |(_, member): &(&ClientId, &Participant)| member.adapter_len > self.adapter_len;
        let (client, member) = self.members.iter().find(longer)?;
        Some(format!(
            "{client} has an adapter of {} values, longer than the average of {}",
            member.adapter_len, self.adapter_len
        ))
    }

    /// Why the main server's copy cannot be meant, if it cannot: it fills up every member's adapter, and is finite.
    pub(crate) fn copy_fault(&self, copy: &[f32]) -> Option<String> {
        let shortest = (self.members.values().map(|member| self.whole_len(member)).min()).unwrap_or(self.adapter_len);
        let (len, whole) = (copy.len() as u64, self.adapter_len);
        if len > whole || whole - len > shortest {
            Some(format!(
                "a copy of {len} values, where an average of {whole} is made of adapters of {shortest} and more"
            ))
        } else {
            let position = copy.iter().position(|value| !value.is_finite())?;
            Some(format!("value {position} of the copy is not finite"))
        }
    }

    /// Values of a member's blocks at the run's rank.
    fn whole_len(&self, member: &Participant) -> u64 {
        let of_rule = self.rule.as_ref().zip(member.rank).and_then(|(rule, _)| {
            let shape = rule.shape();
            let (part, block) = (member.part(), shape.block_len(shape.rank()));
            Some((shape.blocks(part.len, part.rank?)? as u64).saturating_mul(block as u64))
        });
        of_rule.unwrap_or(member.adapter_len)
    }

    /// Why an update cannot be used, if it cannot.
    pub fn fault(
        &self,
        member: &Participant,
        update: &AdapterUpdate,
        asked: Option<Leaving>,
    ) -> Option<(ExclusionReason, String)> {
        let (values, moments) = (&update.values, &update.moments);
        let length = |len: u64| usize::try_from(len).unwrap_or(usize::MAX);
        if update.base != member.base {
            let detail = format!("an adapter that started from {}, not {}", update.base, member.base);
            Some((ExclusionReason::WrongBase, detail))
        } else if values.len() != length(member.adapter_len) {
            let detail = format!("an adapter of {} values, not {}", values.len(), member.adapter_len);
            Some((ExclusionReason::WrongLength, detail))
        } else if let Some(position) = values.iter().position(|value| !value.is_finite()) {
            let detail = format!("value {position} of the adapter is not finite");
            Some((ExclusionReason::NotFinite, detail))
        } else if !match (moments, asked) {
            (Some(moments), Some(Leaving { len, steps })) => moments.are_of(length(len), steps),
            (moments, asked) => moments.is_some() == asked.is_some(),
        } {
            let detail = "moments other than those asked for".to_owned();
            Some((ExclusionReason::WrongLength, detail))
        } else if moments.as_ref().is_some_and(|moments| !moments.are_possible()) {
            let detail = "a moment that is not finite, or a second one below zero".to_owned();
            Some((ExclusionReason::NotFinite, detail))
        } else if !(1..=self.max_examples).contains(&update.examples) {
            let detail = format!(
                "{} examples in a round of at most {}",
                update.examples, self.max_examples
            );
            Some((ExclusionReason::Examples, detail))
        } else {
            None
        }
    }

    /// Whether every member has sent its adapter.
    pub(crate) fn is_complete(&self) -> bool {
        self.members.values().all(|member| member.update.is_some())
    }

    /// Aggregates what has come. `base` is what the round began with, as far as that is known.
    pub fn close(self, base: &[f32]) -> Closed {
        let updates: Vec<(ClientId, Part, Update)> = self
            .members
            .into_iter()
            .filter_map(|(client, member)| Some((client, member.part(), member.update?)))
            .collect();
        let (leaving, copy) = (self.asked).map_or((None, Vec::new()), |asked| (asked.moments, asked.copy));
        let whole = usize::try_from(self.adapter_len).unwrap_or(usize::MAX);
        // All was checked on arrival, so the only error left is that there is no update.
        let aggregate = aggregate(self.rule.as_ref(), whole, base, &updates, &copy);
        let moments = |part: fn(&Moments) -> &Vec<f32>| {
            let parts = weighted(&updates, |update| update.moments.as_ref().map(part))?;
            match &self.rule {
                Some(rule) => rule.moments(&parts).ok(),
                None => weighted_mean(&parts).ok(),
            }
        };
        let average = aggregate.map(|Aggregate { values, exact, errors }| Mean {
            digest: Digest::of_values(&values),
            values,
            moments: leaving.and_then(|Leaving { steps, .. }| {
                Some(Moments {
                    steps,
                    first: moments(|moments| &moments.first)?,
                    second: moments(|moments| &moments.second)?,
                })
            }),
            exact: exact.map(Box::new),
            errors,
        });
        let included: Vec<Inclusion> = updates
            .iter()
            .map(|(client, _, update)| Inclusion {
                client: *client,
                examples: update.examples,
            })
            .collect();
        let told = RoundClosed {
            round: self.round,
            included,
            excluded: self.excluded,
            average,
        };
        let parts = updates.iter().map(|(client, part, _)| (*client, *part)).collect();
        Closed {
            told,
            rule: self.rule,
            parts,
        }
    }
}

fn aggregate(
    rule: Option<&Rule>,
    whole: usize,
    base: &[f32],
    updates: &[(ClientId, Part, Update)],
    copy: &[f32],
) -> Option<Aggregate> {
    let Some(rule) = rule else {
        let weighted = weighted(updates, |update| Some(&update.values))?;
        return Some(Aggregate {
            values: mean_of_prefixes(&weighted, whole, copy).ok()?,
            exact: None,
            errors: None,
        });
    };
    let shape = rule.shape();
    let contributions: Option<Vec<ClientAdapter<'_>>> = (updates.iter())
        .map(|(_, part, update)| {
            let rank = part.rank.unwrap_or(shape.rank());
            Some(ClientAdapter {
                weight: update.examples,
                blocks: shape.blocks(update.values.len(), rank)?,
                rank,
                values: &update.values,
            })
        })
        .collect();
    let blocks = shape.blocks(whole, shape.rank())?;
    rule.aggregate(blocks, base, &contributions?, copy).ok()
}

/// What `part` takes from each update, weighted by examples.
fn weighted(
    updates: &[(ClientId, Part, Update)],
    part: impl Fn(&Update) -> Option<&Vec<f32>>,
) -> Option<Vec<(u64, &[f32])>> {
    (updates.iter())
        .map(|(_, _, update)| Some((update.examples, part(update)?.as_slice())))
        .collect()
}
