//! Times as people and files write them, in UTC.
//!
//! Separate because it knows of nothing but the calendar.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Year, month, day, hour, minute and second in UTC. The calendar repeats every 400 years, which begin in March here so that
/// a leap day comes last.
fn civil(time: SystemTime) -> [u64; 6] {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
    let days = seconds / 86_400 + 719_468; // since 0000-03-01
    let (era, day) = (days / 146_097, days % 146_097);
    let year_of_era = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    [
        year,
        month,
        day_of_month,
        seconds / 3600 % 24,
        seconds / 60 % 60,
        seconds % 60,
    ]
}

/// `20250131-235959`.
pub fn file_time(time: SystemTime) -> String {
    let [year, month, day, hour, minute, second] = civil(time);
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
}

/// `2025-01-31T23:59:59Z`.
pub fn text_time(time: SystemTime) -> String {
    let [year, month, day, hour, minute, second] = civil(time);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// The time that [`text_time`] writes so, from 1970 to 9999.
pub fn time_of_text(text: &str) -> Option<SystemTime> {
    let number = |range: std::ops::Range<usize>| -> Option<u64> {
        let digits = text.get(range)?;
        let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
        digits.parse().ok().filter(|_| is_number)
    };
    let [year, month, day] = [number(0..4)?, number(5..7)?, number(8..10)?];
    let [hour, minute, second] = [number(11..13)?, number(14..16)?, number(17..19)?];
    let march = (month + 9) % 12;
    let year = year.checked_sub(u64::from(month <= 2))?;
    let day_of_year = (153 * march + 2) / 5 + day.checked_sub(1)?;
    let days = 365 * year + year / 4 - year / 100 + year / 400 + day_of_year;
    let seconds = days.checked_sub(719_468)? * 86_400 + hour * 3600 + minute * 60 + second;
    let time = UNIX_EPOCH.checked_add(Duration::from_secs(seconds))?;
    // Other texts would be read as one of these: 30 February, or a letter in a dash's place.
    (text_time(time) == text).then_some(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_civil_dates() {
        let time = |seconds| text_time(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(time(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(time(1_735_689_599), "2024-12-31T23:59:59Z");
        assert_eq!(time(4_107_542_400), "2100-03-01T00:00:00Z");
    }

    #[test]
    fn a_written_time_is_read_back_and_others_are_none() {
        for seconds in [
            0,
            951_782_399,
            951_782_400,
            1_735_689_599,
            4_107_542_400,
            253_402_300_799,
        ] {
            let time = UNIX_EPOCH + Duration::from_secs(seconds);
            assert_eq!(time_of_text(&text_time(time)), Some(time), "{seconds}");
        }
        for text in [
            "",
            "2025-01-01",
            "2025-02-30T00:00:00Z",
            "2025-13-01T00:00:00Z",
            "2025-01-00T00:00:00Z",
            "1969-12-31T23:59:59Z",
            "0000-01-01T00:00:00Z",
            "2025-01-01 00:00:00Z",
            "2025-01-01T00:00:00Z ",
            "2025-01-01T24:00:00Z",
            "é025-01-01T00:00:00Z",
            "+025-01-01T00:00:00Z",
        ] {
            assert_eq!(time_of_text(text), None, "{text}");
        }
    }
}
