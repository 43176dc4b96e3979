//! One connection after its handshake: order, exactly-once delivery and liveness.
//!
//! Messages are numbered from 0 and handed on strictly in order, each once. Every frame acknowledges the messages its
//! sender has taken in. A pong answers a ping by its nonce, and says whether the messages sent before that ping have
//! arrived; those that have not are sent again. On an ordered, reliable transport such as a WebSocket nothing is
//! therefore ever sent twice, and on a lossy one (the simulator, a transport to come) nothing is lost.
//!
//! What is sent with `send_paced` leaves no earlier than the emulated uplink lets it (`pace`), and what is sent after it no
//! earlier than that; pings and pongs overtake both. A message counts as sent when it leaves.
//!
//! Separate from the sessions, which so see an ordered stream and keep to what the messages mean.

use std::collections::VecDeque;
use std::time::Duration;

use super::codec::{
    DecodeError, Frame, decode_frame, decode_message, encode_checked_frame, encode_frame, encode_message_frame,
    set_acknowledged,
};
use super::message::{DIGESTS_SINCE, Message, Version};
use super::pace::Pace;

/// Unanswered pings after which the other side is gone.
pub const MISSED_PINGS: u32 = 3;

/// Messages that may wait for an acknowledgement. A peer that answers pings never comes near.
const MAX_UNACKNOWLEDGED: usize = 256;

/// What ends a connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error("acknowledges message {acknowledged} of {sent} sent")]
    Acknowledgement { acknowledged: u32, sent: u32 },
    #[error("answers ping {nonce}, which was not sent")]
    Nonce { nonce: u32 },
    #[error("has stopped acknowledging messages")]
    Unacknowledged,
}

impl LinkError {
    /// Whether it is the way that is at fault, and no peer.
    pub fn is_damage(&self) -> bool {
        *self == LinkError::Decode(DecodeError::Damaged)
    }
}

/// How long a peer can be silent before it is gone: it takes a ping to ask, and `MISSED_PINGS` unanswered.
pub fn silence_limit(ping_interval: Duration) -> Duration {
    ping_interval.saturating_mul(MISSED_PINGS + 1)
}

/// A message that has not left yet.
struct Waiting {
    leaves: Duration,
    number: u32,
    frame: Vec<u8>,
}

struct Sent {
    number: u32,
    frame: Vec<u8>,
    /// The first ping sent after this message was (last) sent.
    next_ping: u32,
}

/// One side of a connection.
pub(super) struct Link {
    /// Largest frame taken in.
    limit: usize,
    /// Whether large messages carry a digest.
    checks: bool,
    next_number: u32,
    pace: Pace,
    waiting: VecDeque<Waiting>,
    unacknowledged: VecDeque<Sent>,
    /// Messages taken in.
    received: u32,
    outbox: VecDeque<Vec<u8>>,
    ping_interval: Duration,
    ping_at: Duration,
    next_ping: u32,
    heard: bool,
    missed: u32,
}

impl Link {
    /// A link that pings at once and every `ping_interval` after.
    pub fn new(now: Duration, ping_interval: Duration, limit: usize) -> Link {
        Link {
            limit,
            checks: false,
            next_number: 0,
            pace: Pace::default(),
            waiting: VecDeque::new(),
            unacknowledged: VecDeque::new(),
            received: 0,
            outbox: VecDeque::new(),
            ping_interval,
            ping_at: now,
            next_ping: 0,
            heard: true,
            missed: 0,
        }
    }

    /// Sends what peers of `version` understand.
    pub fn speaking(self, version: Version) -> Link {
        Link {
            checks: version >= DIGESTS_SINCE,
            ..self
        }
    }

    /// Changes the largest frame taken in.
    pub(crate) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// How fast messages sent with `send_paced` leave, in bits per second.
    pub(crate) fn set_rate(&mut self, bits_per_s: Option<f64>) {
        self.pace.set_rate(bits_per_s);
    }

    /// Sends a message, after those that wait. Returns the bytes of its frame.
    pub fn send(&mut self, message: &Message) -> usize {
        let leaves = self.waiting.back().map(|last| last.leaves);
        self.queue(leaves, message)
    }

    /// Sends a message over the emulated uplink, for which its frame takes the time it has.
    pub(crate) fn send_paced(&mut self, now: Duration, message: &Message) {
        let frame = self.queue(Some(now), message);
        let leaves = self.pace.departure(now, frame);
        if let Some(last) = self.waiting.back_mut() {
            last.leaves = leaves;
        }
        self.release(now);
    }

    /// Numbers a message and lets it wait until `leaves`, or lets it go at once. Returns the bytes of its frame.
    fn queue(&mut self, leaves: Option<Duration>, message: &Message) -> usize {
        let number = self.next_number;
        self.next_number = self.next_number.wrapping_add(1);
        let encode = if self.checks {
            encode_checked_frame
        } else {
            encode_message_frame
        };
        let frame = encode(number, self.received, message);
        let bytes = frame.len();
        match leaves {
            Some(leaves) => self.waiting.push_back(Waiting { leaves, number, frame }),
            None => self.let_go(number, frame),
        }
        bytes
    }

    fn let_go(&mut self, number: u32, frame: Vec<u8>) {
        self.outbox.push_back(frame.clone());
        self.unacknowledged.push_back(Sent {
            number,
            frame,
            next_ping: self.next_ping,
        });
    }

    /// Lets go what may have left by now.
    fn release(&mut self, now: Duration) {
        while let Some(mut waiting) = self.waiting.pop_front_if(|first| first.leaves <= now) {
            set_acknowledged(&mut waiting.frame, self.received);
            self.let_go(waiting.number, waiting.frame);
        }
    }

    /// Lets everything go at once: nothing is sent after it.
    pub fn flush(&mut self) {
        self.release(Duration::MAX);
    }

    /// Takes in a frame and returns the message it holds, if that is the next one.
    ///
    /// # Errors
    /// A frame no honest peer sends. The connection is to be closed.
    pub fn handle_frame(&mut self, bytes: &[u8]) -> Result<Option<Message>, LinkError> {
        if bytes.len() > self.limit {
            return Err(DecodeError::TooLarge {
                bytes: bytes.len(),
                limit: self.limit,
            }
            .into());
        }
        let frame = decode_frame(bytes)?;
        let (Frame::Ping { acknowledged, .. } | Frame::Pong { acknowledged, .. } | Frame::Message { acknowledged, .. }) =
            frame;
        if acknowledged > self.next_number {
            return Err(LinkError::Acknowledgement {
                acknowledged,
                sent: self.next_number,
            });
        }
        self.hear();
        while self
            .unacknowledged
            .front()
            .is_some_and(|sent| sent.number < acknowledged)
        {
            self.unacknowledged.pop_front();
        }
        match frame {
            Frame::Ping { nonce, .. } => {
                self.outbox.push_back(encode_frame(Frame::Pong {
                    nonce,
                    acknowledged: self.received,
                }));
                Ok(None)
            }
            Frame::Pong { nonce, .. } => {
                if nonce >= self.next_ping {
                    return Err(LinkError::Nonce { nonce });
                }
                self.send_again(nonce);
                Ok(None)
            }
            // Later ones come again after the missing one; earlier ones are repetitions.
            Frame::Message { number, .. } if number != self.received => Ok(None),
            Frame::Message { kind, body, .. } => {
                let message = decode_message(kind, body)?;
                self.received = self.received.wrapping_add(1);
                Ok(Some(message))
            }
        }
    }

    /// There was a sign of life, such as a part of a frame.
    pub(crate) fn hear(&mut self) {
        self.heard = true;
        self.missed = 0;
    }

    /// Sends again what had been sent before ping `nonce` and had not arrived when that ping did.
    fn send_again(&mut self, nonce: u32) {
        for sent in self.unacknowledged.iter_mut().filter(|sent| sent.next_ping <= nonce) {
            sent.next_ping = self.next_ping;
            set_acknowledged(&mut sent.frame, self.received);
            self.outbox.push_back(sent.frame.clone());
        }
    }

    /// Pings and lets go what waits, when it is time. Returns whether the other side is gone.
    pub fn handle_timeout(&mut self, now: Duration) -> bool {
        self.release(now);
        if now < self.ping_at {
            return false;
        }
        if !self.heard {
            self.missed += 1;
        }
        self.heard = false;
        self.ping_at = now + self.ping_interval;
        self.outbox.push_back(encode_frame(Frame::Ping {
            nonce: self.next_ping,
            acknowledged: self.received,
        }));
        self.next_ping = self.next_ping.wrapping_add(1);
        self.missed >= MISSED_PINGS
    }

    /// Whether more messages wait for an acknowledgement than an honest peer lets wait.
    pub(crate) fn is_overdue(&self) -> bool {
        self.unacknowledged.len() > MAX_UNACKNOWLEDGED
    }

    pub(crate) fn poll_frame(&mut self) -> Option<Vec<u8>> {
        self.outbox.pop_front()
    }

    pub fn poll_timeout(&self) -> Duration {
        self.waiting
            .front()
            .map_or(self.ping_at, |first| first.leaves.min(self.ping_at))
    }
}

#[cfg(test)]
mod tests {
    use super::super::message::Ready;
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(5);
    const READY: Message = Message::Ready(Ready {
        assignment: 0,
        speed: None,
    });

    fn pair() -> (Link, Link) {
        (
            Link::new(Duration::ZERO, INTERVAL, 1024),
            Link::new(Duration::ZERO, INTERVAL, 1024),
        )
    }

    fn deliver(from: &mut Link, to: &mut Link) -> Vec<Message> {
        let mut messages = Vec::new();
        while let Some(frame) = from.poll_frame() {
            messages.extend(to.handle_frame(&frame).unwrap());
        }
        messages
    }

    #[test]
    fn a_lost_message_is_sent_again_after_the_next_ping_and_only_then() {
        let (mut here, mut there) = pair();
        here.send(&READY);
        here.send(&Message::Leave);
        let lost = here.poll_frame().unwrap();
        assert_eq!(
            deliver(&mut here, &mut there),
            [],
            "what follows a lost message waits for it"
        );
        here.handle_timeout(Duration::ZERO);
        deliver(&mut here, &mut there);
        deliver(&mut there, &mut here);
        assert_eq!(deliver(&mut here, &mut there), [READY, Message::Leave]);
        assert_eq!(
            there.handle_frame(&lost).unwrap(),
            None,
            "the late original is a repetition"
        );
        here.handle_timeout(INTERVAL);
        deliver(&mut here, &mut there);
        deliver(&mut there, &mut here);
        assert_eq!(here.poll_frame(), None, "nothing is left to send again");
    }

    #[test]
    fn an_ordered_transport_never_carries_a_message_twice() {
        let (mut here, mut there) = pair();
        here.handle_timeout(Duration::ZERO);
        let ping = here.poll_frame().unwrap();
        // Sent after the ping, so the pong says nothing about it.
        here.send(&READY);
        assert_eq!(there.handle_frame(&ping).unwrap(), None);
        deliver(&mut there, &mut here);
        assert_eq!(deliver(&mut here, &mut there), [READY]);
        assert_eq!(here.poll_frame(), None);
    }

    #[test]
    fn three_missed_pings_are_the_end_and_any_frame_is_a_sign_of_life() {
        let (mut here, mut there) = pair();
        for tick in 0..3 {
            assert!(!here.handle_timeout(INTERVAL * tick));
        }
        there.send(&READY);
        deliver(&mut there, &mut here);
        for tick in 3..6 {
            assert!(!here.handle_timeout(INTERVAL * tick), "tick {tick}");
        }
        assert!(here.handle_timeout(INTERVAL * 6));
    }

    #[test]
    fn a_part_of_a_frame_is_a_sign_of_life() {
        let (mut here, _) = pair();
        for tick in 0..20 {
            assert!(!here.handle_timeout(INTERVAL * tick), "tick {tick}");
            here.hear();
        }
        assert!(!here.handle_timeout(INTERVAL * 20));
        assert!(!here.handle_timeout(INTERVAL * 21));
        assert!(!here.handle_timeout(INTERVAL * 22));
        assert!(here.handle_timeout(INTERVAL * 23), "nothing comes any more");
    }

    #[test]
    fn a_paced_message_leaves_in_its_time_and_only_pings_overtake_it() {
        let (mut here, mut there) = pair();
        here.set_rate(Some(8.0 * 100.0));
        here.send_paced(Duration::ZERO, &READY);
        here.send(&Message::Leave);
        here.handle_timeout(Duration::ZERO);
        assert_eq!(deliver(&mut here, &mut there), []);
        let leaves = here.poll_timeout();
        let bytes = encode_message_frame(0, 0, &READY).len();
        assert_eq!(leaves, Duration::from_millis(10 * bytes as u64));
        // The pong says that nothing has arrived, which is no reason to send anything again.
        deliver(&mut there, &mut here);
        assert_eq!(here.poll_frame(), None);
        here.handle_timeout(leaves);
        assert_eq!(deliver(&mut here, &mut there), [READY, Message::Leave]);
        assert_eq!(here.poll_timeout(), INTERVAL);
    }

    #[test]
    fn impossible_acknowledgements_and_sizes_are_refused() {
        let (mut here, _) = pair();
        let frame = encode_frame(Frame::Ping {
            nonce: 0,
            acknowledged: 1,
        });
        assert_eq!(
            here.handle_frame(&frame),
            Err(LinkError::Acknowledgement {
                acknowledged: 1,
                sent: 0
            })
        );
        let frame = encode_frame(Frame::Pong {
            nonce: 7,
            acknowledged: 0,
        });
        assert_eq!(here.handle_frame(&frame), Err(LinkError::Nonce { nonce: 7 }));
        let error = here.handle_frame(&[0; 1025]).unwrap_err();
        assert_eq!(
            error,
            LinkError::Decode(DecodeError::TooLarge {
                bytes: 1025,
                limit: 1024
            })
        );
    }
}
