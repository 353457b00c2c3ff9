//! What the kernel says about this process, out of /proc.

use std::fs;

/// The figures that Prometheus clients report of a process.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Process {
    pub(crate) open_descriptors: u64,
    pub(crate) max_descriptors: u64,
    pub(crate) resident_bytes: u64,
    pub(crate) virtual_bytes: u64,
    pub(crate) threads: u64,
    pub(crate) cpu_seconds: f64,
}

impl Process {
    /// Reads them now. What cannot be read is 0.
    pub(crate) fn read() -> Self {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let mut process = Process {
            open_descriptors: open_descriptors(),
            max_descriptors: limit.current.unwrap_or(u64::MAX),
            ..Process::default()
        };
        if let Ok(stat) = fs::read_to_string("/proc/self/stat") {
            process.take_stat(
                &stat,
                rustix::param::clock_ticks_per_second(),
                rustix::param::page_size() as u64,
            );
        }
        process
    }

    /// proc(5): fields are counted after the command's closing parenthesis, since the command may contain spaces.
    fn take_stat(&mut self, stat: &str, ticks_per_s: u64, page_bytes: u64) {
        let Some((_, fields)) = stat.rsplit_once(')') else {
            return;
        };
        // Field 3 (state) is the first here.
        let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
        let field =
            |number: usize| fields.get(number - 3).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        self.cpu_seconds = (field(14) + field(15)) as f64 / ticks_per_s.max(1) as f64;
        self.threads = field(20);
        self.virtual_bytes = field(23);
        self.resident_bytes = field(24) * page_bytes;
    }
}

/// Since Linux 6.2 the directory's size is the count; before, it is 0 and the entries are counted.
fn open_descriptors() -> u64 {
    let size = fs::metadata("/proc/self/fd").map_or(0, |directory| directory.len());
    if size > 0 {
        return size;
    }
    // The descriptor that reads the directory is not counted.
    fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count().saturating_sub(1) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_read_by_field() {
        let mut process = Process::default();
        let stat = "12 (token) ring)) S 1 12 12 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 7 0 100 1048576 256 18446744073709551615";
        process.take_stat(stat, 100, 4096);
        assert_eq!(process.cpu_seconds, 2.0);
        assert_eq!(
            (process.threads, process.virtual_bytes, process.resident_bytes),
            (7, 1_048_576, 1_048_576)
        );
    }

    #[test]
    fn this_process_is_read() {
        let process = Process::read();
        assert!(process.open_descriptors >= 3 && process.threads >= 1 && process.resident_bytes > 100_000);
    }
}
