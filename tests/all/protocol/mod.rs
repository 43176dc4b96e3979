//! What the two servers and a client owe each other: handshake, authorisation, joining, liveness, membership, pairing.
//!
//! Some tests talk to one session frame by frame, as a `peer` that need not be honest. Others run whole training runs in virtual
//! time, over networks that lose, repeat and reorder.

mod aggregation;
mod cut;
mod deadline;
mod edge;
mod federated;
mod handshake;
mod misbehaviour;
mod pairing;
mod peer;
mod placement;
mod random;
mod resume;
mod run;
