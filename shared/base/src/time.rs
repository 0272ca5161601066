//! Points in time: Unix milliseconds on the wire, `timestamptz` in PostgreSQL, RFC 3339 in
//! JetStream's replies and in the headers of events.

use std::time::{SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

const NANOS_PER_MS: i128 = 1_000_000;

/// Unix milliseconds. A time outside their range, which is 292 million years, becomes 0.
pub fn unix_ms(at: OffsetDateTime) -> i64 {
    i64::try_from(at.unix_timestamp_nanos() / NANOS_PER_MS).unwrap_or_default()
}

/// From Unix milliseconds. The protocol accepts no others than those that are a date; any other
/// becomes the epoch.
pub fn from_unix_ms(ms: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * NANOS_PER_MS)
        .unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

/// Unix milliseconds of a time in RFC 3339, such as `2026-11-27T03:09:40.5Z`; `None` when the text
/// is no such time.
pub fn parse_rfc3339_ms(text: &str) -> Option<i64> {
    OffsetDateTime::parse(text, &Rfc3339).ok().map(unix_ms)
}

/// RFC 3339, which has no years beyond 9999: `None` for those.
pub fn rfc3339(at: OffsetDateTime) -> Option<String> {
    at.format(&Rfc3339).ok()
}

/// Unix milliseconds of the system's clock; 0 before 1970.
pub fn system_time_ms(at: SystemTime) -> i64 {
    let since_epoch = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn milliseconds_survive_the_way_there_and_back() {
        for ms in [0, 1, -1, 1_795_748_980_500, 253_402_300_799_999] {
            assert_eq!(unix_ms(from_unix_ms(ms)), ms);
        }
        assert_eq!(from_unix_ms(i64::MAX), OffsetDateTime::UNIX_EPOCH);
    }

    #[test]
    fn rfc_3339_is_read_in_any_offset_and_cut_to_milliseconds() {
        let ms = Some(1_795_748_980_500);
        for text in [
            "2026-11-27T03:09:40.5Z",
            "2026-11-27T03:09:40.500999999Z",
            "2026-11-27T04:09:40.5+01:00",
        ] {
            assert_eq!(parse_rfc3339_ms(text), ms, "{text}");
        }
        assert_eq!(parse_rfc3339_ms("yesterday"), None);
        let written = rfc3339(from_unix_ms(1_795_748_980_500));
        assert_eq!(written.as_deref(), Some("2026-11-27T03:09:40.5Z"));
    }

    #[test]
    fn a_clock_before_1970_says_0() {
        assert_eq!(system_time_ms(UNIX_EPOCH + Duration::from_millis(7)), 7);
        assert_eq!(system_time_ms(UNIX_EPOCH - Duration::from_millis(7)), 0);
    }
}
