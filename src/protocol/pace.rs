//! An emulated uplink: how long a frame is on its way out.
//!
//! A link carries one frame at a time, in the order in which they are handed over, and a frame of n bytes takes
//! `8 n / rate` seconds from when the link is free for it. It is by itself, without a clock, because the same arithmetic
//! paces a native client, a browser and the simulator.

use std::time::Duration;

/// When a link is free, and how fast it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    bits_per_s: Option<f64>,
    free_at: Duration,
}

impl Pace {
    /// The rate of frames handed over from now on; `None` takes no time.
    pub(crate) fn set_rate(&mut self, bits_per_s: Option<f64>) {
        self.bits_per_s = bits_per_s;
    }

    /// When a frame of `bytes`, handed over at `now`, has left.
    pub(crate) fn departure(&mut self, now: Duration, bytes: usize) -> Duration {
        let takes = self.bits_per_s.map_or(Duration::ZERO, |rate| {
            Duration::try_from_secs_f64(bytes as f64 * 8.0 / rate).unwrap_or(Duration::MAX)
        });
        self.free_at = self.free_at.max(now).saturating_add(takes);
        self.free_at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_frame_takes_its_bits_over_the_rate_once_the_link_is_free() {
        let mut pace = Pace::default();
        assert_eq!(pace.departure(SECOND, 1 << 20), SECOND, "no rate takes no time");
        pace.set_rate(Some(8000.0));
        assert_eq!(pace.departure(10 * SECOND, 3000), 13 * SECOND);
        assert_eq!(
            pace.departure(11 * SECOND, 500),
            13 * SECOND + SECOND / 2,
            "after the one before"
        );
        assert_eq!(
            pace.departure(20 * SECOND, 1000),
            21 * SECOND,
            "an idle link saves nothing up"
        );
    }

    #[test]
    fn a_new_rate_holds_for_the_frames_after_it_and_none_keeps_the_order() {
        let mut pace = Pace::default();
        pace.set_rate(Some(8.0));
        assert_eq!(pace.departure(Duration::ZERO, 10), 10 * SECOND);
        pace.set_rate(Some(80.0));
        assert_eq!(pace.departure(Duration::ZERO, 10), 11 * SECOND);
        pace.set_rate(None);
        assert_eq!(pace.departure(Duration::ZERO, 10), 11 * SECOND);
    }
}
