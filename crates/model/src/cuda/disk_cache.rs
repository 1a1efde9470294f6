//! Small files that are expensive to make again: compiled kernels, algorithms of products. Found by a hash of
//! all that they depend on.
//!
//! A file is written beside its place and renamed, so that a reader sees all of it or nothing. It
//! carries a checksum: a damaged one is made anew. The oldest go when there are too many.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

/// Most files of a cache; a model's kernels are eight.
const MOST_FILES: usize = 256;
/// In front of the checksum and the content.
const MAGIC: &[u8; 8] = b"slcache1";

/// A folder of such files.
#[derive(Clone, Debug)]
pub struct DiskCache {
    folder: PathBuf,
    extension: &'static str,
}

impl DiskCache {
    /// In `folder`, which is made when the first file is written.
    pub fn new(folder: PathBuf, extension: &'static str) -> Self {
        Self { folder, extension }
    }

    /// `servelab/NAME` in the user's folder of caches (`XDG_CACHE_HOME`, else `~/.cache`). `None` where there is
    /// neither.
    pub fn of_user(name: &str, extension: &'static str) -> Option<Self> {
        let given = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
        let caches = given.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
        Some(Self::new(caches.join("servelab").join(name), extension))
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What was kept under this key, if it is whole.
    pub fn get(&self, key: Key) -> Option<Vec<u8>> {
        let path = self.path(key);
        let bytes = fs::read(&path).ok()?;
        let (magic, rest) = bytes.split_at_checked(MAGIC.len())?;
        let (checksum, content) = rest.split_at_checked(8)?;
        if magic != MAGIC || checksum != xxh3_64(content).to_le_bytes() {
            tracing::warn!(file = %path.display(), "a damaged file of the cache is made anew");
            return None;
        }
        // What is used stays: the age of a file is when it was last read.
        let _ =
            File::options().append(true).open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        Some(content.to_vec())
    }

    /// Keeps `content`. A cache that cannot be written costs time and nothing else, so this only logs.
    pub fn put(&self, key: Key, content: &[u8]) {
        if let Err(error) = self.write(key, content) {
            tracing::warn!(folder = %self.folder.display(), %error, "the cache cannot be written");
        }
    }

    fn write(&self, key: Key, content: &[u8]) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let unique = format!("{:032x}.{}.{:?}", key.0, std::process::id(), std::thread::current().id());
        let own = self.folder.join(unique.replace(['(', ')'], ""));
        let written = (|| {
            let mut file = File::create(&own)?;
            file.write_all(MAGIC)?;
            file.write_all(&xxh3_64(content).to_le_bytes())?;
            file.write_all(content)?;
            fs::rename(&own, self.path(key))
        })();
        if written.is_err() {
            let _ = fs::remove_file(&own);
        }
        self.drop_oldest();
        written
    }

    /// Another process may do the same; who comes second finds less to do.
    fn drop_oldest(&self) {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let mut files: Vec<(SystemTime, PathBuf)> = entries
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
            .collect();
        files.sort_unstable();
        let surplus = files.len().saturating_sub(MOST_FILES);
        for (_, path) in &files[..surplus] {
            let _ = fs::remove_file(path);
        }
    }

    fn path(&self, key: Key) -> PathBuf {
        self.folder.join(format!("{:032x}.{}", key.0, self.extension))
    }
}

/// A hash of all that a file depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key(u128);

impl Key {
    /// Of some texts, each with its length, so that moving a letter from one to the next makes a difference.
    pub fn of(parts: &[&str]) -> Self {
        let mut all = Vec::new();
        for part in parts {
            all.extend_from_slice(&(part.len() as u64).to_le_bytes());
            all.extend_from_slice(part.as_bytes());
        }
        Self(xxh3_128(&all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_comes_back_and_what_is_damaged_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let cache = DiskCache::new(folder.path().join("kernels"), "cubin");
        let key = Key::of(&["source", "sm_90a"]);
        assert_eq!(cache.get(key), None);
        cache.put(key, b"machine code");
        assert_eq!(cache.get(key).as_deref(), Some(&b"machine code"[..]));
        assert_eq!(cache.get(Key::of(&["sources", "m_90a"])), None);
        let path = cache.path(key);
        let whole = fs::read(&path).unwrap();
        for length in [0, 7, 12, whole.len() - 1] {
            fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(cache.get(key), None, "{length} bytes of it");
        }
        let mut flipped = whole.clone();
        flipped[20] ^= 1;
        fs::write(&path, flipped).unwrap();
        assert_eq!(cache.get(key), None);
        cache.put(key, b"again");
        assert_eq!(cache.get(key).as_deref(), Some(&b"again"[..]));
        assert_eq!(fs::read_dir(cache.folder()).unwrap().count(), 1, "no half-written file is left");
    }

    #[test]
    fn the_oldest_go() {
        let folder = tempfile::tempdir().unwrap();
        let cache = DiskCache::new(folder.path().to_owned(), "cubin");
        let first = Key::of(&["0"]);
        for index in 0..MOST_FILES {
            cache.put(Key::of(&[&index.to_string()]), b"x");
        }
        let old = SystemTime::now() - std::time::Duration::from_secs(60);
        let second = Key::of(&["1"]);
        for key in [first, second] {
            File::options().append(true).open(cache.path(key)).unwrap().set_modified(old).unwrap();
        }
        // Reading it makes it young again.
        assert!(cache.get(first).is_some());
        cache.put(Key::of(&["one more"]), b"x");
        assert!(cache.get(first).is_some());
        assert_eq!(cache.get(second), None);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), MOST_FILES);
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("in the way");
        fs::write(&file, "").unwrap();
        let cache = DiskCache::new(file, "cubin");
        cache.put(Key::of(&["a"]), b"x");
        assert_eq!(cache.get(Key::of(&["a"])), None);
    }
}
