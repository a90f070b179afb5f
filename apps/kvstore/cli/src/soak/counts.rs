//! What a client did and met, kept in a file so that the supervisor knows it even if the client is killed.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

macro_rules! counts {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counts of one client, or of all.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        pub struct Counts {
            $($(#[$doc])* pub $name: u64,)*
        }

        /// How many there are.
        const FIELDS: usize = [$(stringify!($name)),*].len();

        impl Counts {
            /// Every count with its name.
            #[must_use]
            pub const fn fields(&self) -> [(&'static str, u64); FIELDS] {
                [$((stringify!($name), self.$name)),*]
            }

            fn of(numbers: [u64; FIELDS]) -> Self {
                let [$($name),*] = numbers;
                Self { $($name),* }
            }

            /// Adds another client's.
            pub const fn add(&mut self, other: &Self) {
                $(self.$name += other.$name;)*
            }
        }
    };
}

counts! {
    /// Multi-operations.
    multis,
    /// Operations that a reject rule refused.
    rejected,
    /// Operations that the server refused because it was full.
    full,
    /// Operations that it refused for the moment.
    busy,
    /// Connections that the client cut.
    cuts,
    /// Connections made anew, after a cut or because the server had ended them.
    reconnects,
    /// Requests that were sent again.
    repeats,
    /// Operations of which the client was told that nobody knows whether they were executed.
    unknown,
    /// One-sided reads with one READ.
    direct,
    /// One-sided reads by way of the hash table.
    by_table,
    /// One-sided reads that found nothing.
    misses,
    /// One-sided reads that were asked of the server.
    doubts,
    /// Those of them, or tried again, that took too long.
    too_long,
}

impl Counts {
    /// Writes them over those before.
    ///
    /// # Errors
    /// As the file says.
    pub fn save(&self, file: &File) -> io::Result<()> {
        let bytes: Vec<u8> = self
            .fields()
            .iter()
            .flat_map(|(_, n)| n.to_le_bytes())
            .collect();
        file.write_all_at(&bytes, 0)
    }

    /// Reads what a client wrote; nothing, if it was killed before it wrote anything.
    ///
    /// # Errors
    /// As the file says.
    pub fn load(path: &Path) -> io::Result<Self> {
        let mut bytes = Vec::new();
        match File::open(path) {
            Ok(mut file) => file.read_to_end(&mut bytes)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => 0,
            Err(e) => return Err(e),
        };
        let mut numbers = [0; FIELDS];
        for (number, bytes) in numbers.iter_mut().zip(bytes.as_chunks().0) {
            *number = u64::from_le_bytes(*bytes);
        }
        Ok(Self::of(numbers))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("counts");
        assert_eq!(Counts::load(&path).unwrap(), Counts::default());
        let file = File::create(&path).unwrap();
        assert_eq!(Counts::load(&path).unwrap(), Counts::default());
        let mut counts = Counts {
            multis: 1,
            too_long: u64::from(u32::MAX) + 7,
            ..Counts::default()
        };
        counts.save(&file).unwrap();
        counts.doubts = 3;
        counts.save(&file).unwrap();
        assert_eq!(Counts::load(&path).unwrap(), counts);
        let mut sum = counts;
        sum.add(&counts);
        assert_eq!((sum.multis, sum.doubts), (2, 6));
    }
}
