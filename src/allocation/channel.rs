//! One radio link: its subchannels, how well each client is heard on them, and the powers allowed.
//!
//! Everything here is a number; where numbers come from geometry (path loss, fading) the scenario makes them, with the functions
//! at the end of this file.

use super::Error;

/// Which of the links a number belongs to, for errors and reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkName {
    /// Activations to the main server.
    Main,
    /// Adapters to the federated server.
    Federated,
    /// Gradients back to the clients.
    Download,
}

impl std::fmt::Display for LinkName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            LinkName::Main => "main",
            LinkName::Federated => "federated",
            LinkName::Download => "download",
        })
    }
}

/// Signal-to-noise ratio per watt of transmit power, `gain / (noise density × bandwidth)`, in 1/W.
#[derive(Clone, Debug, PartialEq)]
pub enum SnrPerWatt {
    /// `[client]`: the same on every subchannel.
    Flat(Vec<f64>),
    /// `[client][subchannel]`.
    Selective(Vec<Vec<f64>>),
}

/// More would only be a mistake in a file.
pub(crate) const MAX_SUBCHANNELS: usize = 1 << 16;

/// A link of `subchannels` equal subchannels.
#[derive(Clone, Debug, PartialEq)]
pub struct Channel {
    /// How many.
    pub subchannels: usize,
    /// Of one subchannel.
    pub bandwidth_hz: f64,
    /// How well signals arrive.
    pub snr_per_watt: SnrPerWatt,
    /// `[client]`: the most a client may send with, over all its subchannels.
    pub power_max_w: Vec<f64>,
    /// The most all clients together may send with.
    pub power_total_w: f64,
}

impl Channel {
    /// How many clients share the link.
    pub fn clients(&self) -> usize {
        self.power_max_w.len()
    }

    /// Whether a client has the same ratio on every subchannel.
    pub fn is_flat(&self) -> bool {
        matches!(self.snr_per_watt, SnrPerWatt::Flat(_))
    }

    /// Signal-to-noise ratio per watt of `client` on `subchannel`, in 1/W.
    pub fn snr_per_watt(&self, client: usize, subchannel: usize) -> f64 {
        match &self.snr_per_watt {
            SnrPerWatt::Flat(gains) => gains[client],
            SnrPerWatt::Selective(gains) => gains[client][subchannel],
        }
    }

    /// That every number can be used and every client can have a subchannel.
    ///
    /// # Errors
    /// [`Error`] names link, client and constraint.
    pub fn check(&self, link: LinkName) -> Result<(), Error> {
        let (clients, subchannels) = (self.clients(), self.subchannels);
        if clients == 0 {
            return Err(Error::NoClients);
        }
        if clients > subchannels {
            return Err(Error::TooFewSubchannels {
                link,
                clients,
                subchannels,
            });
        }
        if subchannels > MAX_SUBCHANNELS {
            return Err(Error::TooManySubchannels { link, subchannels });
        }
        positive(link, "the bandwidth of a subchannel", "Hz", self.bandwidth_hz)?;
        positive(link, "the total power", "W", self.power_total_w)?;
        for (client, &power) in self.power_max_w.iter().enumerate() {
            // A base station sends to its clients under the total alone.
            if power.is_nan() || power <= 0.0 {
                return Err(Error::Client {
                    link,
                    client,
                    what: "power_max_w",
                    value: power,
                });
            }
        }
        let check_gain = |client: usize, gain: f64| match gain.is_finite() && gain > 0.0 {
            true => Ok(()),
            false => Err(Error::Client {
                link,
                client,
                what: "snr_per_watt",
                value: gain,
            }),
        };
        let check_length = |what, found, expected| match found == expected {
            true => Ok(()),
            false => Err(Error::Length { what, found, expected }),
        };
        match &self.snr_per_watt {
            SnrPerWatt::Flat(gains) => {
                check_length(format!("snr_per_watt of the {link} link"), gains.len(), clients)?;
                for (client, &gain) in gains.iter().enumerate() {
                    check_gain(client, gain)?;
                }
            }
            SnrPerWatt::Selective(gains) => {
                check_length(format!("snr_per_watt of the {link} link"), gains.len(), clients)?;
                for (client, row) in gains.iter().enumerate() {
                    check_length(
                        format!("snr_per_watt of client {client} on the {link} link"),
                        row.len(),
                        subchannels,
                    )?;
                    for &gain in row {
                        check_gain(client, gain)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Bits per second of `client` with `power_w` on every subchannel that `owner` gives it.
    pub fn rate_bits_per_s(&self, client: usize, owner: &[usize], power_w: &[f64]) -> f64 {
        let spectral: f64 = (0..self.subchannels)
            .filter(|&subchannel| owner[subchannel] == client)
            .map(|subchannel| (power_w[subchannel] * self.snr_per_watt(client, subchannel)).ln_1p())
            .sum();
        self.bandwidth_hz * spectral / std::f64::consts::LN_2
    }
}

fn positive(link: LinkName, what: &'static str, unit: &'static str, value: f64) -> Result<(), Error> {
    match value.is_finite() && value > 0.0 {
        true => Ok(()),
        false => Err(Error::Link {
            link,
            what,
            unit,
            value,
        }),
    }
}

/// Watts of a power in dBm: `10^(x/10 - 3)`.
pub(crate) fn dbm_to_w(dbm: f64) -> f64 {
    10.0_f64.powf(dbm / 10.0 - 3.0)
}

/// Path loss in dB at `distance_m`, by intercept (dB at 1 km) and slope (dB per decade). 128.1 and 37.6 are the macro-cell values of 3GPP
/// TR 36.814 at 2 GHz.
pub(crate) fn path_loss_db(distance_m: f64, intercept_db: f64, slope_db: f64) -> f64 {
    intercept_db + slope_db * (distance_m / 1000.0).log10()
}

/// SNR per watt, in 1/W, of a path with `loss_db` over `bandwidth_hz` at a noise density in dBm/Hz.
pub fn snr_per_watt(loss_db: f64, noise_dbm_per_hz: f64, bandwidth_hz: f64) -> f64 {
    10.0_f64.powf(-loss_db / 10.0) / (dbm_to_w(noise_dbm_per_hz) * bandwidth_hz)
}
