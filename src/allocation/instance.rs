//! Instances: a problem as bare numbers in JSON, with nothing left to a convention. For solvers to be compared on.

use serde::Deserialize;

use super::Error;
use super::channel::{Channel, SnrPerWatt};
use super::delay::{Cell, Problem};

/// One instance as it stands in a file; unknown fields (answers, notes) are passed over.
#[derive(Clone, Debug, Deserialize)]
pub struct Instance {
    /// For reports.
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
    /// Local steps of a round.
    pub local_iters: u32,
    /// One column in the SNR tables, valid for every subchannel.
    pub flat: bool,
    /// Of one subchannel of the main link.
    pub bandwidth_main_hz: f64,
    /// Of one subchannel of the federated link.
    pub bandwidth_fed_hz: f64,
    /// `[client]`: the most a client may send with, on each link.
    pub pmax_w: Vec<f64>,
    /// The most all may send with together on the main link.
    pub pth_main_w: f64,
    /// The most all may send with together on the federated link.
    pub pth_fed_w: f64,
    /// `[client][subchannel]`, in 1/W.
    pub snr_per_watt_main: Vec<Vec<f64>>,
    /// `[client][subchannel]`, in 1/W.
    pub snr_per_watt_fed: Vec<Vec<f64>>,
    /// Candidate cuts.
    pub splits: Vec<u32>,
    /// Candidate ranks.
    pub ranks: Vec<u32>,
    /// `[rank]`
    pub rounds: Vec<f64>,
    /// `[split][rank][client]`
    pub client_fwd_s: Vec<Vec<Vec<f64>>>,
    /// `[split][rank][client]`
    pub client_bwd_s: Vec<Vec<Vec<f64>>>,
    /// `[split][rank]`
    pub server_s: Vec<Vec<f64>>,
    /// `[split][rank]`: a step's activations.
    pub upload_bits: Vec<Vec<f64>>,
    /// `[split][rank]`: a round's adapter.
    pub adapter_bits: Vec<Vec<f64>>,
}

impl Instance {
    /// # Errors
    /// [`Error`] names what is missing or impossible.
    pub fn problem(&self) -> Result<Problem, Error> {
        let clients = self.clients;
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
        self.check_table("client_fwd_s", &self.client_fwd_s)?;
        self.check_table("client_bwd_s", &self.client_bwd_s)?;
        self.check_table("server_s", &self.server_s)?;
        self.check_table("upload_bits", &self.upload_bits)?;
        self.check_table("adapter_bits", &self.adapter_bits)?;
        let cell = |split: usize, rank: usize| Cell {
            client_forward_s: self.client_fwd_s[split][rank].clone(),
            client_backward_s: self.client_bwd_s[split][rank].clone(),
            server_s: self.server_s[split][rank],
            upload_bits: self.upload_bits[split][rank],
            adapter_bits: self.adapter_bits[split][rank],
            gradient_bits: 0.0,
            compute_j: vec![0.0; clients],
            memory_bytes: vec![0.0; clients],
        };
        let cells = (0..self.splits.len())
            .map(|split| (0..self.ranks.len()).map(|rank| cell(split, rank)).collect())
            .collect();
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
    /// That a table has a row for each split and in it an entry for each rank.
    fn check_table<T>(&self, what: &str, table: &[Vec<T>]) -> Result<(), Error> {
        length(what, table.len(), self.splits.len())?;
        for (row, split) in table.iter().zip(&self.splits) {
            length(&format!("{what} of split {split}"), row.len(), self.ranks.len())?;
        }
        Ok(())
    }
}

fn length(what: &str, found: usize, expected: usize) -> Result<(), Error> {
    match found == expected {
        true => Ok(()),
        false => Err(Error::Length {
            what: what.to_owned(),
            found,
            expected,
        }),
    }
}
