//! The `Date` field (RFC 9110 sections 5.6.7 and 6.6.1), written anew once per second at most.

/// A ready `Date` line and the second it is of.
#[derive(Clone, Debug)]
pub struct DateLine {
    unix_time_s: u64,
    line: [u8; LINE_BYTES],
}

/// `Date: Sun, 06 Nov 1994 08:49:37 GMT` and CRLF.
const LINE_BYTES: usize = 37;
const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

impl Default for DateLine {
    fn default() -> Self {
        DateLine { unix_time_s: 0, line: write(0) }
    }
}

impl DateLine {
    /// The line for a time in seconds since 1970 (UTC, below the year 10000), CRLF included.
    pub fn at(&mut self, unix_time_s: u64) -> &str {
        if self.unix_time_s != unix_time_s {
            *self = DateLine { unix_time_s, line: write(unix_time_s) };
        }
        std::str::from_utf8(&self.line).unwrap_or_default()
    }
}

fn write(unix_time_s: u64) -> [u8; LINE_BYTES] {
    let (days, second) = (unix_time_s / 86_400, unix_time_s % 86_400);
    let (year, month, day) = civil(days);
    let text = format!(
        "Date: {}, {day:02} {} {year:04} {:02}:{:02}:{:02} GMT\r\n",
        DAYS[(days % 7) as usize],
        MONTHS[month as usize - 1],
        second / 3600,
        second / 60 % 60,
        second % 60,
    );
    let mut line = [b' '; LINE_BYTES];
    if let Some(bytes) = text.as_bytes().first_chunk::<LINE_BYTES>() {
        line = *bytes;
    }
    line
}

/// Year, month (1 to 12) and day of month of a day since 1970-01-01 in the Gregorian calendar, counted in eras of 400 years
/// from 0000-03-01, so that the leap day is the last of its year.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        let mut line = DateLine::default();
        for (unix_time_s, expected) in [
            (0, "Date: Thu, 01 Jan 1970 00:00:00 GMT\r\n"),
            (784_111_777, "Date: Sun, 06 Nov 1994 08:49:37 GMT\r\n"),
            (951_827_696, "Date: Tue, 29 Feb 2000 12:34:56 GMT\r\n"),
            (1_798_761_599, "Date: Thu, 31 Dec 2026 23:59:59 GMT\r\n"),
            (253_402_300_799, "Date: Fri, 31 Dec 9999 23:59:59 GMT\r\n"),
        ] {
            assert_eq!(line.at(unix_time_s), expected);
        }
    }

    #[test]
    fn days_follow_each_other() {
        let mut last = civil(0);
        for day in 1..200_000 {
            let next = civil(day);
            let follows = next == (last.0, last.1, last.2 + 1)
                || (next == (last.0, last.1 + 1, 1) && last.2 >= 28)
                || (next == (last.0 + 1, 1, 1) && (last.1, last.2) == (12, 31));
            assert!(follows, "{last:?} {next:?}");
            last = next;
        }
    }
}
