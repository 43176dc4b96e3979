//! The two ends of the model: the embedding below the first block, on the host, and the final norm with the head above the last,
//! on the device.

pub mod embedding;
#[doc(hidden)]
pub mod head;
