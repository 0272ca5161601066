//! Medians, percentiles, tables.

use std::time::Duration;

/// The middle one.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The value that `part` of 1 of the sorted values do not exceed.
pub fn percentile(sorted: &[Duration], part: f64) -> Duration {
    let index = (sorted.len() as f64 * part).ceil() as usize;
    sorted
        .get(index.saturating_sub(1))
        .copied()
        .unwrap_or_default()
}

/// How many a second, to three digits.
pub fn per_second(count: usize, took: Duration) -> f64 {
    count as f64 / took.as_secs_f64()
}

/// 58,300
pub fn rounded(value: f64) -> String {
    let digits = 10f64.powf((value.abs().max(1.0).log10().floor() - 2.0).max(0.0));
    let whole = ((value / digits).round() * digits) as u64;
    let text = whole.to_string();
    let mut grouped = String::new();
    for (index, digit) in text.chars().enumerate() {
        if index > 0 && (text.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// 0.42 ms
pub fn milliseconds(value: Duration) -> String {
    let ms = value.as_secs_f64() * 1e3;
    if ms < 10.0 {
        format!("{ms:.2} ms")
    } else {
        format!("{ms:.0} ms")
    }
}

/// A Markdown table, the first column to the left and the others to the right.
pub fn table(title: &str, head: &[&str], rows: &[Vec<String>]) {
    println!("### {title}\n\n| {} |", head.join(" | "));
    println!("| --- |{}", " ---: |".repeat(head.len() - 1));
    for row in rows {
        println!("| {} |", row.join(" | "));
    }
    println!();
}

/// The same numbers every time, in no visible order (SplitMix64).
pub fn scattered(n: u64) -> u64 {
    let mut z = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
