//! The rounds: adapters in, averages out.
//!
//! Separate from `round`, which knows what is in an adapter: here is when one may come, and who is told what.

use std::collections::BTreeMap;
use std::time::Duration;

use super::super::message::*;
use super::FederatedServerSession;
use super::event::{ControlAccess, FederatedEvent};
use super::membership::Guest;
use super::round::{OpenRound, Part, Participant, Update};
use crate::terms::ids::{ClientId, RoundKey};

impl FederatedServerSession {
    pub(super) fn handle_update(&mut self, client: ClientId, update: AdapterUpdate, bytes: u64, now: Duration) {
        let Some(run) = &self.run else {
            return self.decline(client, update.round, "no run is open");
        };
        if update.run != run.office.run {
            let detail = format!("an adapter of run {}, not {}", update.run, run.office.run);
            return self.refuse_update(client, ExclusionReason::Misbehaved, detail, now);
        }
        let round = update.round;
        let Some(open) = self
            .open
            .as_mut()
            .filter(|open| open.round == round && open.members.contains_key(&client))
        else {
            return match &self.last {
                Some(last) if last.told.round == round && last.parts.contains_key(&client) => {
                    // It did not hear of the average.
                    self.send_average(&[client]);
                }
                // In one process nobody hears of a round before this does.
                _ if self.is_ahead(round) && self.config.control == ControlAccess::Local && self.open.is_some() => {
                    let detail = format!("an adapter of {round}, which nobody has begun");
                    self.refuse_update(client, ExclusionReason::Misbehaved, detail, now);
                }
                _ if self.is_ahead(round) => {
                    self.early.insert(client, (update, bytes));
                }
                _ => self.decline(client, round, "not a member of an open round"),
            };
        };
        let (Some(asked), Some(member)) = (&open.asked, open.members.get(&client)) else {
            self.early.insert(client, (update, bytes));
            return;
        };
        if let Some((reason, detail)) = open.fault(member, &update, asked.moments) {
            return self.refuse_update(client, reason, detail, now);
        }
        // A repetition after a reconnection changes nothing.
        if let Some(Participant {
            update: slot @ None, ..
        }) = open.members.get_mut(&client)
        {
            let AdapterUpdate {
                examples,
                values,
                moments,
                ..
            } = update;
            *slot = Some(Update {
                examples,
                values,
                moments,
                bytes,
            });
            self.events.push_back(FederatedEvent::UpdateAccepted {
                client,
                round,
                examples,
            });
            self.reply(ControlReply::Received { round, client, bytes });
        }
    }

    /// Whether the main server may still open this round.
    fn is_ahead(&self, round: RoundKey) -> bool {
        let open = self.open.as_ref().map(|open| open.round);
        let last = self.last.as_ref().map(|last| last.told.round);
        open.max(last).is_none_or(|known| known < round)
    }

    fn refuse_update(&mut self, client: ClientId, reason: ExclusionReason, detail: String, now: Duration) {
        self.exclude(client, reason);
        self.expel(Guest::Client(client), StopReason::BadUpdate, detail, now);
    }

    fn decline(&mut self, client: ClientId, round: RoundKey, detail: &str) {
        let open = self.open.as_ref().map(|open| open.round);
        let declined = UpdateDeclined {
            round,
            open,
            detail: detail.to_owned(),
        };
        if let Some(connection) = self.connection_of(Guest::Client(client)) {
            self.door.send(connection, &Message::UpdateDeclined(declined));
        }
    }

    pub(super) fn open_round(&mut self, opening: OpenRound) {
        if self.run.is_none() {
            return;
        }
        let round = opening.round;
        if let Some(last) = &self.last
            && last.told.round == round
        {
            // The main server did not hear of it.
            return self.reply(ControlReply::RoundClosed(last.told.clone()));
        }
        match &self.open {
            Some(open) if open.round == round => {
                // Repeated after a lost link: words in either direction may have been lost with it.
                let left: Vec<ClientId> = open
                    .members
                    .keys()
                    .filter(|client| !opening.members.contains_key(client))
                    .copied()
                    .collect();
                let unheard: Vec<Exclusion> = open
                    .excluded
                    .iter()
                    .filter(|exclusion| opening.members.contains_key(&exclusion.client))
                    .cloned()
                    .collect();
                let here: Vec<(ClientId, u64)> = (open.members.iter())
                    .filter_map(|(client, member)| Some((*client, member.update.as_ref()?.bytes)))
                    .collect();
                for client in left {
                    self.exclude(client, ExclusionReason::Departed);
                }
                for (client, bytes) in here {
                    self.reply(ControlReply::Received { round, client, bytes });
                }
                for exclusion in unheard {
                    self.reply(ControlReply::Excluded { round, exclusion });
                }
            }
            _ => {
                self.usual.open(round);
                self.open = Some(opening);
            }
        }
    }

    /// Takes in what came of this round, or of one before it, sooner than it was asked for.
    pub(super) fn take_early(&mut self, round: RoundKey, now: Duration) {
        let (due, early) = std::mem::take(&mut self.early)
            .into_iter()
            .partition(|(_, (update, _))| update.round <= round);
        self.early = early;
        for (client, (update, bytes)) in due {
            self.handle_update(client, update, bytes, now);
        }
    }

    /// Closes the round when every member has sent its adapter. Called after every change, of membership above all.
    pub(super) fn retest(&mut self, now: Duration) {
        let Some(mut open) = self.open.take_if(|open| open.is_complete()) else {
            return;
        };
        let round = open.round;
        for client in self.usual.outliers(&open) {
            let reason = ExclusionReason::Outlier;
            open.members.remove(&client);
            open.excluded.push(Exclusion { client, reason });
            self.events
                .push_back(FederatedEvent::ClientExcluded { client, round, reason });
            self.expel(Guest::Client(client), StopReason::BadUpdate, reason.to_string(), now);
        }
        let distances = self.usual.distances(&open);
        let closed = open.close(self.usual.base());
        let average = closed.told.average.as_ref().map(|average| average.values.as_slice());
        self.usual.close(round, distances, average);
        let told = closed.told.clone();
        self.events.push_back(FederatedEvent::RoundClosed {
            round: told.round,
            included: told.included.clone(),
            excluded: told.excluded.clone(),
        });
        let members: Vec<ClientId> = closed.parts.keys().copied().collect();
        self.reply(ControlReply::RoundClosed(told));
        self.last = Some(closed);
        self.send_average(&members);
    }

    fn send_average(&mut self, clients: &[ClientId]) {
        let Some(last) = &self.last else { return };
        let (round, Some(Mean { digest, values, .. })) = (last.told.round, &last.told.average) else {
            return;
        };
        let mut averages: BTreeMap<Part, Message> = BTreeMap::new();
        for client in clients {
            let (Some(connection), Some(part)) = (self.connection_of(Guest::Client(*client)), last.parts.get(client))
            else {
                continue;
            };
            let average = averages.entry(*part).or_insert_with(|| {
                let own = last.part_of(*part, values);
                let digest = match own.len() == values.len() {
                    true => *digest,
                    false => Digest::of_values(&own),
                };
                Message::Average(Average {
                    round,
                    digest,
                    values: own,
                })
            });
            self.door.send(connection, average);
        }
    }
}
