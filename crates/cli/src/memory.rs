//! How much memory is free, and how much of it the KV cache takes where nobody says.

/// Assumed free where the system does not tell.
const UNKNOWN_FREE_BYTES: u64 = 4 << 30;

/// Tokens that the default KV cache holds for each running sequence.
const TOKENS_PER_SEQUENCE: u64 = 1024;

/// What the default size of the KV cache depends on.
#[derive(Clone, Copy, Debug)]
pub struct KvDemand {
    /// Bytes of keys and values of one block.
    pub block_bytes: u64,
    /// Tokens per block.
    pub block_size: u32,
    /// Longest sequence in tokens.
    pub context: u32,
    pub max_running: u32,
    /// Bytes that the weights will take from the free memory.
    pub weight_bytes: u64,
}

/// Blocks of the KV cache where nobody says how many: room for 1024 tokens of each running
/// sequence and for one whole context, within a quarter of what is free once the weights are loaded, so
/// that a laptop stays usable. At least one block.
pub fn default_kv_blocks(demand: KvDemand, free_bytes: Option<u64>) -> u64 {
    let context = u64::from(demand.context);
    let tokens = context.max(u64::from(demand.max_running) * context.min(TOKENS_PER_SEQUENCE));
    let wanted = tokens.div_ceil(u64::from(demand.block_size.max(1)));
    let free = free_bytes.unwrap_or(UNKNOWN_FREE_BYTES).saturating_sub(demand.weight_bytes);
    let affordable = free / 4 / demand.block_bytes.max(1);
    wanted.min(affordable).max(1)
}

/// Bytes that a process may still take: what the system calls available, within the limit of the control
/// group (a container). `None` where neither is told.
pub fn free_bytes() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let system = read("/proc/meminfo").and_then(|text| available_in_meminfo(&text));
    let limit = read("/sys/fs/cgroup/memory.max").and_then(|text| text.trim().parse::<u64>().ok());
    let used = read("/sys/fs/cgroup/memory.stat").and_then(|text| anonymous_in_stat(&text)).unwrap_or(0);
    let group = limit.map(|limit| limit.saturating_sub(used));
    [system, group].into_iter().flatten().min()
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn available_in_meminfo(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// Memory of a control group that cannot be given back, in bytes: page cache does not count.
fn anonymous_in_stat(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("anon ")).and_then(|bytes| bytes.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn demand() -> KvDemand {
        KvDemand { block_bytes: 16 << 10, block_size: 16, context: 512, max_running: 64, weight_bytes: 0 }
    }

    #[test]
    fn a_small_model_gets_all_its_sequences_whole() {
        assert_eq!(default_kv_blocks(demand(), Some(16 * GIB)), 64 * 512 / 16);
    }

    #[test]
    fn a_long_context_fits_once() {
        let long = KvDemand { context: 131_072, max_running: 4, ..demand() };
        assert_eq!(default_kv_blocks(long, Some(16 * GIB)), 131_072 / 16);
    }

    #[test]
    fn at_most_a_quarter_of_what_the_weights_leave_is_taken() {
        let large = KvDemand { block_bytes: 4 << 20, context: 131_072, weight_bytes: 8 * GIB, ..demand() };
        let blocks = default_kv_blocks(large, Some(16 * GIB));
        assert_eq!(blocks * large.block_bytes, 2 * GIB);
    }

    #[test]
    fn without_room_one_block_remains_for_the_error_message() {
        let large = KvDemand { weight_bytes: 20 * GIB, ..demand() };
        assert_eq!(default_kv_blocks(large, Some(16 * GIB)), 1);
        assert!(default_kv_blocks(demand(), None) > 1);
    }

    #[test]
    fn the_systems_figures_are_read() {
        let meminfo = "MemTotal:       24000000 kB\nMemFree: 1 kB\nMemAvailable:   2048 kB\n";
        assert_eq!(available_in_meminfo(meminfo), Some(2 << 20));
        assert_eq!(available_in_meminfo("MemTotal: 1 kB\n"), None);
        assert_eq!(anonymous_in_stat("anon 4096\nfile 9999\n"), Some(4096));
    }
}
