//! What the machine says of itself, for the head of a report.

use servelab_bench::result::ClientInfo;

/// Processor, cores and system; what is not told stays empty.
pub fn describe() -> ClientInfo {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    ClientInfo {
        cpu: cpu_model(&read("/proc/cpuinfo")),
        cores: u32::try_from(cores).unwrap_or(u32::MAX),
        os: format!("{} {}", std::env::consts::OS, kernel.trim()).trim().to_owned(),
        ..ClientInfo::default()
    }
}

fn cpu_model(cpuinfo: &str) -> String {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"));
    let name = line.and_then(|line| line.split_once(':')).map(|(_, name)| name.trim());
    name.unwrap_or(std::env::consts::ARCH).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_named() {
        assert_eq!(cpu_model("processor\t: 0\nmodel name\t: AMD EPYC 9R14\n"), "AMD EPYC 9R14");
        assert_eq!(cpu_model(""), std::env::consts::ARCH);
    }
}
