//! How many connections the limit on open files leaves room for.

use crate::settings::SettingsError;

/// Connections at most where nobody says how many.
const DEFAULT_CONNECTIONS: u32 = 4096;
/// Files that the rest of the program may have open: checkpoint, logs, sockets of its own.
const OTHER_FILES: u64 = 256;

/// Raises the soft limit on open files as far as needed and allowed, and says how many connections there
/// may be.
///
/// # Errors
/// If as many as `asked` for can never be open.
pub fn max_connections(asked: Option<u32>) -> Result<usize, SettingsError> {
    let wanted = u64::from(asked.unwrap_or(DEFAULT_CONNECTIONS)) + OTHER_FILES;
    // Where the system does not tell, its own error at the limit is met and logged.
    let limit = rlimit::increase_nofile_limit(wanted).unwrap_or(wanted);
    within(asked, limit)
}

fn within(asked: Option<u32>, limit: u64) -> Result<usize, SettingsError> {
    let room = limit.saturating_sub(OTHER_FILES.min(limit / 2));
    match asked {
        Some(asked) if u64::from(asked) > room => {
            Err(SettingsError::OpenFiles { connections: asked, limit, room })
        }
        Some(asked) => Ok(asked as usize),
        None => Ok(room.clamp(1, DEFAULT_CONNECTIONS.into()) as usize),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_fit_into_the_limit_on_open_files() {
        assert_eq!(within(None, 1 << 20).unwrap(), 4096);
        assert_eq!(within(None, 1024).unwrap(), 768);
        assert_eq!(within(None, 64).unwrap(), 32);
        assert_eq!(within(Some(768), 1024).unwrap(), 768);
        let error = within(Some(769), 1024).unwrap_err().to_string();
        assert_eq!(
            error,
            "--max-connections 769 does not fit: this process may open 1024 files, which leaves 768 \
             connections; lower it, or raise the limit (ulimit -n)"
        );
    }
}
