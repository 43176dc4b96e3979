//! One round: what its members start from, what they may send, and what that comes to.
//!
//! Separate because it is a value without connections: what is checked of an update, and how updates are averaged.

use std::collections::BTreeMap;
use std::time::Duration;

use super::super::message::*;
use crate::federated::{mean_of_prefixes, weighted_mean};
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
    /// Numbers in the adapters of those who are in the average.
    pub lengths: BTreeMap<ClientId, usize>,
}

/// A round that adapters may come for.
pub(super) struct OpenRound {
    pub round: RoundKey,
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
    /// Why the main server cannot mean this round, if it cannot: members' adapters are prefixes of the average.
    pub(crate) fn contradiction(&self) -> Option<String> {
        let longer = |(_, member): &(&ClientId, &Participant)| member.adapter_len > self.adapter_len;
        let (client, member) = self.members.iter().find(longer)?;
        Some(format!(
            "{client} has an adapter of {} values, longer than the average of {}",
            member.adapter_len, self.adapter_len
        ))
    }

    /// Why the main server's copy cannot be meant, if it cannot: it fills up every member's adapter, and is finite.
    pub(crate) fn copy_fault(&self, copy: &[f32]) -> Option<String> {
        let shortest = (self.members.values().map(|member| member.adapter_len).min()).unwrap_or(self.adapter_len);
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

    /// Averages what has come.
    pub fn close(self) -> Closed {
        let updates: Vec<(ClientId, Update)> = self
            .members
            .into_iter()
            .filter_map(|(client, member)| Some((client, member.update?)))
            .collect();
        let (leaving, copy) = (self.asked).map_or((None, Vec::new()), |asked| (asked.moments, asked.copy));
        let moments = |part: fn(&Moments) -> &Vec<f32>| {
            weighted_mean(&weighted(&updates, |update| update.moments.as_ref().map(part))?).ok()
        };
        let whole = usize::try_from(self.adapter_len).unwrap_or(usize::MAX);
        // All was checked on arrival, so the only error left is that there is no update.
        let values = weighted(&updates, |update| Some(&update.values))
            .and_then(|weighted| mean_of_prefixes(&weighted, whole, &copy).ok());
        let average = values.map(|values| Mean {
            digest: Digest::of_values(&values),
            values,
            moments: leaving.and_then(|Leaving { steps, .. }| {
                Some(Moments {
                    steps,
                    first: moments(|moments| &moments.first)?,
                    second: moments(|moments| &moments.second)?,
                })
            }),
        });
        let included: Vec<Inclusion> = updates
            .iter()
            .map(|(client, update)| Inclusion {
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
        let lengths: BTreeMap<ClientId, usize> = (updates.iter())
            .map(|(client, update)| (*client, update.values.len()))
            .collect();
        Closed { told, lengths }
    }
}

/// What `part` takes from each update, weighted by examples.
fn weighted(updates: &[(ClientId, Update)], part: impl Fn(&Update) -> Option<&Vec<f32>>) -> Option<Vec<(u64, &[f32])>> {
    (updates.iter())
        .map(|(_, update)| Some((update.examples, part(update)?.as_slice())))
        .collect()
}
