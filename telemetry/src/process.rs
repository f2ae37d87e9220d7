//! What the operating system knows of this process, under the names that all Prometheus clients use.

use std::fs;

use cairn_exchange::clock;

use crate::prometheus::{Kind, Writer};

/// Writes the `process_*` metrics; those that cannot be read are left out.
pub(crate) fn write(writer: &mut Writer) {
    if let Some(stat) = fs::read_to_string("/proc/self/stat").ok().as_deref().and_then(Stat::parse) {
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        writer.family(
            "process_cpu_seconds_total",
            Kind::Counter,
            "Total user and system CPU time spent in seconds.",
        );
        writer.value("", stat.cpu_ticks as f64 / ticks);
        if let Some(start) = start_time(stat.start_ticks as f64 / ticks) {
            writer.family(
                "process_start_time_seconds",
                Kind::Gauge,
                "Start time of the process since unix epoch in seconds.",
            );
            writer.value("", start);
        }
        writer.family("process_virtual_memory_bytes", Kind::Gauge, "Virtual memory size in bytes.");
        writer.count("", stat.virtual_bytes);
        writer.family("process_resident_memory_bytes", Kind::Gauge, "Resident memory size in bytes.");
        writer.count("", stat.resident_pages.saturating_mul(rustix::param::page_size() as u64));
    }
    if let Ok(entries) = fs::read_dir("/proc/self/fd") {
        writer.family("process_open_fds", Kind::Gauge, "Number of open file descriptors.");
        writer.count("", entries.count() as u64);
    }
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    if let Some(current) = limit.current {
        writer.family("process_max_fds", Kind::Gauge, "Maximum number of open file descriptors.");
        writer.count("", current);
    }
}

/// The fields of `/proc/self/stat` that are told.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    cpu_ticks: u64,
    /// Since the machine started.
    start_ticks: u64,
    virtual_bytes: u64,
    resident_pages: u64,
}

impl Stat {
    /// See proc_pid_stat(5); the name of the process, in brackets, may hold anything.
    fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // The first field of `rest` is the third of the file.
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        Some(Self {
            cpu_ticks: number(14)?.saturating_add(number(15)?),
            start_ticks: number(22)?,
            virtual_bytes: number(23)?,
            resident_pages: number(24)?,
        })
    }
}

/// Start of the process in seconds since 1970, from its start since the machine did.
fn start_time(since_boot: f64) -> Option<f64> {
    let uptime: f64 = fs::read_to_string("/proc/uptime")
        .ok()?
        .split_whitespace()
        .next()?
        .parse()
        .ok()?;
    let btime = fs::read_to_string("/proc/stat").ok().and_then(|stat| boot_time(&stat));
    let boot = btime.unwrap_or(clock::unix_seconds() as f64 - uptime);
    Some(boot + since_boot)
}

fn boot_time(stat: &str) -> Option<f64> {
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prometheus::Format;

    #[test]
    fn a_stat_line_is_read_past_odd_names() {
        let line = "42 (a) b (c)) S 1 42 42 0 -1 4194560 5 0 0 0 120 30 0 0 20 0 4 0 777 1048576 99 18446744073709551615 1";
        assert_eq!(
            Stat::parse(line),
            Some(Stat {
                cpu_ticks: 150,
                start_ticks: 777,
                virtual_bytes: 1_048_576,
                resident_pages: 99
            })
        );
        assert_eq!(Stat::parse("42 (a) S 1"), None);
        assert_eq!(boot_time("cpu 1 2\nbtime 1700000000\n"), Some(1_700_000_000.0));
    }

    #[test]
    fn this_process_has_files_memory_and_an_age() {
        let mut writer = Writer::new(Format::Text);
        write(&mut writer);
        let text = String::from_utf8(writer.finish()).unwrap();
        let value = |name: &str| -> f64 {
            let line = text.lines().find(|line| line.starts_with(name)).expect(name);
            line.rsplit_once(' ').unwrap().1.parse().unwrap()
        };
        assert!(value("process_open_fds ") >= 3.0);
        assert!(value("process_max_fds ") >= value("process_open_fds "));
        assert!(value("process_resident_memory_bytes ") > 100_000.0);
        assert!(value("process_virtual_memory_bytes ") >= value("process_resident_memory_bytes "));
        assert!(value("process_cpu_seconds_total ") >= 0.0);
        let age = clock::unix_seconds() as f64 - value("process_start_time_seconds ");
        assert!((-2.0..86_400.0).contains(&age), "{age}");
    }
}
