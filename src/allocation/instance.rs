//! Instances: a problem as bare numbers in JSON, with nothing left to a convention. For solvers to be compared on.

use serde::Deserialize;

use super::Error;
use super::channel::{Channel, SnrPerWatt};
use super::delay::{Cell, Problem};

/// One instance as it stands in a file; unknown fields (answers, notes) are passed over.
#[derive(Clone, Debug, Deserialize)]
pub struct Instance {
    #[serde(default)]
    pub name: String,
    /// Clients.
    #[serde(rename = "K")]
    pub clients: usize,
    /// Subchannels of the main link.
    #[serde(rename = "M")]
    pub main_subchannels: usize,
    /// Subchannels of the federated link.
    #[serde(rename = "N")]
    pub federated_subchannels: usize,
    pub local_iters: u32,
    /// One column in the SNR tables, valid for every subchannel.
    pub flat: bool,
    pub bandwidth_main_hz: f64,
    pub bandwidth_fed_hz: f64,
    pub pmax_w: Vec<f64>,
    pub pth_main_w: f64,
    pub pth_fed_w: f64,
    pub snr_per_watt_main: Vec<Vec<f64>>,
    pub snr_per_watt_fed: Vec<Vec<f64>>,
    pub splits: Vec<u32>,
    pub ranks: Vec<u32>,
    /// `[rank]`
    pub rounds: Vec<f64>,
    /// `[split][rank][client]`
    pub client_fwd_s: Vec<Vec<Vec<f64>>>,
    pub client_bwd_s: Vec<Vec<Vec<f64>>>,
    /// `[split][rank]`
    pub server_s: Vec<Vec<f64>>,
    pub upload_bits: Vec<Vec<f64>>,
    pub adapter_bits: Vec<Vec<f64>>,
}

impl Instance {
    /// # Errors
    /// [`Error`] names what is missing or impossible.
    pub fn problem(&self) -> Result<Problem, Error> {
        let clients = self.clients;
        let length = |what: &str, found: usize, expected: usize| match found == expected {
            true => Ok(()),
            false => Err(Error::Length {
                what: what.to_owned(),
                found,
                expected,
            }),
        };
        length("pmax_w", self.pmax_w.len(), clients)?;
        let channel = |what: &str, gains: &[Vec<f64>], subchannels: usize, bandwidth_hz: f64, power_total_w: f64| {
            length(what, gains.len(), clients)?;
            let snr_per_watt = match self.flat {
                true => {
                    for row in gains {
                        length(&format!("a row of {what}"), row.len(), 1)?;
                    }
                    SnrPerWatt::Flat(gains.iter().map(|row| row[0]).collect())
                }
                false => SnrPerWatt::Selective(gains.to_vec()),
            };
            Ok::<_, Error>(Channel {
                subchannels,
                bandwidth_hz,
                snr_per_watt,
                power_max_w: self.pmax_w.clone(),
                power_total_w,
            })
        };
        let mut cells = Vec::with_capacity(self.splits.len());
        for (split, _) in self.splits.iter().enumerate() {
            let mut row = Vec::with_capacity(self.ranks.len());
            for (rank, _) in self.ranks.iter().enumerate() {
                let number = |what: &str, table: &[Vec<f64>]| {
                    (table.get(split).and_then(|row| row.get(rank)).copied()).ok_or_else(|| Error::Length {
                        what: what.to_owned(),
                        found: table.len(),
                        expected: self.splits.len(),
                    })
                };
                let times = |what: &str, table: &[Vec<Vec<f64>>]| {
                    (table.get(split).and_then(|row| row.get(rank)).cloned()).ok_or_else(|| Error::Length {
                        what: what.to_owned(),
                        found: table.len(),
                        expected: self.splits.len(),
                    })
                };
                row.push(Cell {
                    client_forward_s: times("client_fwd_s", &self.client_fwd_s)?,
                    client_backward_s: times("client_bwd_s", &self.client_bwd_s)?,
                    server_s: number("server_s", &self.server_s)?,
                    upload_bits: number("upload_bits", &self.upload_bits)?,
                    adapter_bits: number("adapter_bits", &self.adapter_bits)?,
                    gradient_bits: 0.0,
                    compute_j: vec![0.0; clients],
                    memory_bytes: vec![0.0; clients],
                });
            }
            cells.push(row);
        }
        let problem = Problem {
            local_steps: self.local_iters,
            main: channel(
                "snr_per_watt_main",
                &self.snr_per_watt_main,
                self.main_subchannels,
                self.bandwidth_main_hz,
                self.pth_main_w,
            )?,
            federated: channel(
                "snr_per_watt_fed",
                &self.snr_per_watt_fed,
                self.federated_subchannels,
                self.bandwidth_fed_hz,
                self.pth_fed_w,
            )?,
            download: None,
            broadcast: None,
            splits: self.splits.clone(),
            ranks: self.ranks.clone(),
            rounds: self.rounds.clone(),
            cells,
            memory_max_bytes: None,
            energy_weight_s_per_j: 0.0,
        };
        problem.check()?;
        Ok(problem)
    }
}
