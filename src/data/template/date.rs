//! `strftime_now`: today's date as templates want it.

use std::time::{SystemTime, UNIX_EPOCH};

/// Now, in UTC and English.
pub(super) fn now(format: &str) -> String {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    strftime(format, seconds)
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
/// From the day of 1 January 1970.
const WEEKDAYS: [&str; 7] = [
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
];

/// The parts of C's `strftime` that templates use, in UTC and English; others stay as they are written.
fn strftime(format: &str, seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let hour = second / 3600;
    let twelve = (hour + 11) % 12 + 1;
    let month_name = MONTHS[month as usize - 1];
    let weekday = WEEKDAYS[(days % 7) as usize];
    let mut text = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let mut directive = rest.next();
        // glibc's way of leaving padding out.
        let unpadded = directive == Some('-');
        if unpadded {
            directive = rest.next();
        }
        let number = |value: u64, width: usize| {
            let width = if unpadded { 0 } else { width };
            format!("{value:0width$}")
        };
        match directive {
            Some('Y') => text.push_str(&year.to_string()),
            Some('y') => text.push_str(&number(year % 100, 2)),
            Some('m') => text.push_str(&number(month, 2)),
            Some('d') => text.push_str(&number(day, 2)),
            Some('e') => text.push_str(&format!("{day:>2}")),
            Some('H') => text.push_str(&number(hour, 2)),
            Some('I') => text.push_str(&number(twelve, 2)),
            Some('M') => text.push_str(&number(second / 60 % 60, 2)),
            Some('S') => text.push_str(&number(second % 60, 2)),
            Some('j') => {
                let new_year = days_before(year);
                text.push_str(&number(days - new_year + 1, 3));
            }
            Some('p') => text.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('B') => text.push_str(month_name),
            Some('b' | 'h') => text.push_str(&month_name[..3]),
            Some('A') => text.push_str(weekday),
            Some('a') => text.push_str(&weekday[..3]),
            Some('F') => text.push_str(&format!("{year}-{month:02}-{day:02}")),
            Some('T') => text.push_str(&format!("{hour:02}:{:02}:{:02}", second / 60 % 60, second % 60)),
            Some('%') => text.push('%'),
            Some(other) => text.extend(['%', other]),
            None => text.push('%'),
        }
    }
    text
}

/// Days from 1970 to the first of `year`.
fn days_before(year: u64) -> u64 {
    let leaps = |year: u64| year / 4 - year / 100 + year / 400;
    (year - 1970) * 365 + leaps(year - 1) - leaps(1969)
}

/// Year, month and day of a number of days since 1970.
fn civil(days: u64) -> (u64, u64, u64) {
    let mut year = 1970 + days / 366;
    while days_before(year + 1) <= days {
        year += 1;
    }
    let mut left = days - days_before(year);
    let leap = days_before(year + 1) - days_before(year) == 366;
    for month in 1..=12 {
        let length = match month {
            2 if leap => 29,
            2 => 28,
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        if left < length {
            return (year, month, left + 1);
        }
        left -= length;
    }
    (year + 1, 1, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, date) in [
            (0, "Thu 01 Jan 1970 00:00:00 001"),
            (951_782_399, "Mon 28 Feb 2000 23:59:59 059"),
            (951_782_400, "Tue 29 Feb 2000 00:00:00 060"),
            (1_735_689_599, "Tue 31 Dec 2024 23:59:59 366"),
            (1_735_689_600, "Wed 01 Jan 2025 00:00:00 001"),
            (4_107_542_400, "Mon 01 Mar 2100 00:00:00 060"),
        ] {
            assert_eq!(strftime("%a %d %b %Y %T %j", seconds), date);
        }
        assert_eq!(strftime("%-d %B %I %p %q %", 1_735_689_600), "1 January 12 AM %q %");
    }
}
