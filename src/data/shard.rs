//! Dividing one data set among clients.
//!
//! It is separate because which examples a client holds must not depend on who asks or when: the same call
//! gives the same disjoint parts on every device.

use serde::{Deserialize, Serialize};

use super::DataError;

/// Which examples go to which client. Either way every example goes to exactly one, and the sizes differ by one at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sharding {
    /// Neighbours stay together: in a file sorted by topic the clients' data differ.
    Contiguous,
    /// Client k gets examples k, k + clients, k + 2·clients, …: the clients' data are alike.
    Strided,
}

impl Sharding {
    /// Divides `examples` among `clients`, each part in the original order.
    ///
    /// # Errors
    /// [`DataError::TooFewExamples`] when a client would get none, or there is no client.
    pub fn divide<T>(self, examples: Vec<T>, clients: usize) -> Result<Vec<Vec<T>>, DataError> {
        let total = examples.len();
        if clients == 0 || total < clients {
            return Err(DataError::TooFewExamples {
                examples: total,
                clients,
            });
        }
        let mut parts: Vec<Vec<T>> = (0..clients)
            .map(|_| Vec::with_capacity(total.div_ceil(clients)))
            .collect();
        // The first `total % clients` parts have one example more.
        let (size, longer) = (total / clients, total % clients);
        for (index, example) in examples.into_iter().enumerate() {
            let client = match self {
                Sharding::Strided => index % clients,
                Sharding::Contiguous if index < longer * (size + 1) => index / (size + 1),
                Sharding::Contiguous => longer + (index - longer * (size + 1)) / size,
            };
            parts[client].push(example);
        }
        Ok(parts)
    }
}
