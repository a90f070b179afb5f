//! Files of records by name, `-` for standard input and output.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::{Format, OpenError, Reader, WriteError, Writer, is_standard};
use crate::limits::FILE_BUFFER_BYTES;
use hyv_lab::Replacement;

/// What [`open`] reads from.
pub type Input = Reader<Box<dyn BufRead + Send>>;

/// How far the reading of a file is.
#[derive(Clone, Debug)]
pub struct Watch {
    read: Arc<AtomicU64>,
    /// Bytes of the file; none where that is not known.
    pub total: Option<u64>,
}

impl Watch {
    /// Bytes read so far, with those that wait in the buffer.
    #[must_use]
    pub fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }
}

/// Opens `path` (`-`: standard input) for reading, in `explicit` or what its ending says.
///
/// # Errors
/// [`OpenError`] for an ending that says nothing, a directory, or what the system refuses.
pub fn open(path: &Path, explicit: Option<Format>) -> Result<Input, OpenError> {
    Ok(open_watched(path, explicit, &Arc::default())?.0)
}

/// The same; `stop` ends the reading with an error, also where a pipe or terminal gives nothing to read.
///
/// # Errors
/// As [`open`].
pub fn open_watched(
    path: &Path,
    explicit: Option<Format>,
    stop: &Arc<AtomicBool>,
) -> Result<(Input, Watch), OpenError> {
    let format = Format::choose(path, explicit)?;
    let (opened, name) = if is_standard(path) {
        let stdin = rustix::io::dup(rustix::stdio::stdin());
        let file = stdin.map(File::from).map_err(io::Error::from);
        (file, "standard input".to_owned())
    } else {
        (File::open(path), path.display().to_string())
    };
    let opened = opened.and_then(|f| Ok((f.metadata()?, f)));
    let (meta, inner) = match opened {
        Ok((meta, _)) if meta.is_dir() => return Err(OpenError::Directory { file: name }),
        Ok(pair) => pair,
        Err(error) => return Err(OpenError::Io { file: name, error }),
    };
    let watch = Watch {
        read: Arc::default(),
        total: meta.is_file().then_some(meta.len()),
    };
    let source = Source {
        inner,
        waits: !meta.is_file(),
        read: Arc::clone(&watch.read),
        stop: Arc::clone(stop),
    };
    let input = BufReader::with_capacity(FILE_BUFFER_BYTES, source);
    Ok((Reader::new(Box::new(input), format, name), watch))
}

/// A file whose reading can be ended, and followed.
struct Source {
    inner: File,
    /// A pipe or a device: reading may wait for ever.
    waits: bool,
    read: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Source {
    /// Waits until there is something to read, or it is told to stop.
    fn wait(&self) -> io::Result<()> {
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(io::Error::other("interrupted"));
            }
            let limit = Timespec {
                tv_sec: 0,
                tv_nsec: 100_000_000,
            };
            let mut fds = [PollFd::new(&self.inner, PollFlags::IN)];
            match poll(&mut fds, Some(&limit)) {
                Ok(0) | Err(Errno::INTR) => {}
                // Whatever it is, reading says what.
                Ok(_) | Err(_) => return Ok(()),
            }
        }
    }
}

impl Read for Source {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if self.waits {
            self.wait()?;
        }
        let n = self.inner.read(to)?;
        self.read.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// Creates `path` (`-`: standard output) for writing, in `explicit` or what its ending says. A regular
/// file appears, or is replaced, only by [`FileWriter::finish`]: a broken-off dump never looks whole.
///
/// # Errors
/// [`OpenError`] for an ending that says nothing, a directory, or what the system refuses.
pub fn create(path: &Path, explicit: Option<Format>) -> Result<FileWriter, OpenError> {
    let format = Format::choose(path, explicit)?;
    let (sink, name) = if is_standard(path) {
        (
            Sink::Direct(Box::new(io::stdout())),
            "standard output".to_owned(),
        )
    } else {
        let file = path.display().to_string();
        if path.is_dir() {
            return Err(OpenError::Directory { file });
        }
        match sink(path) {
            Ok(sink) => (sink, file),
            Err(error) => return Err(OpenError::Io { file, error }),
        }
    };
    let replaces = matches!(sink, Sink::Replacement(_));
    let out = BufWriter::with_capacity(FILE_BUFFER_BYTES, sink);
    Ok(FileWriter {
        replaces,
        writer: Writer::new(out, format, name.clone()),
        name,
    })
}

/// Where the bytes go: a pipe or device has to be written as it is, a file can be replaced.
fn sink(path: &Path) -> io::Result<Sink> {
    match fs::metadata(path) {
        Ok(meta) if !meta.is_file() => Ok(Sink::Direct(Box::new(
            File::options().write(true).open(path)?,
        ))),
        _ => Ok(Sink::Replacement(Replacement::create(path)?)),
    }
}

enum Sink {
    Direct(Box<dyn Write + Send>),
    Replacement(Replacement),
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Direct(out) => out.write(bytes),
            Self::Replacement(out) => out.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Direct(out) => out.flush(),
            Self::Replacement(out) => out.flush(),
        }
    }
}

/// A [`Writer`] into a file of this name.
pub struct FileWriter {
    writer: Writer<BufWriter<Sink>>,
    name: String,
    replaces: bool,
}

impl FileWriter {
    /// Writes one record.
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub fn write(&mut self, key: &[u8], value: &[u8]) -> Result<(), WriteError> {
        self.writer.write(key, value)
    }

    /// Whether the file appears, or is replaced, only at the end.
    #[must_use]
    pub const fn replaces(&self) -> bool {
        self.replaces
    }

    /// How many records have been written.
    pub fn written(&self) -> u64 {
        self.writer.written()
    }

    /// Completes the file and puts it in its place. Dropped without this, a regular file is left as
    /// it was before.
    ///
    /// # Errors
    /// [`WriteError::Io`].
    pub fn finish(self) -> Result<(), WriteError> {
        let out = self.writer.finish()?;
        let done = match out.into_inner() {
            Ok(Sink::Direct(_)) => Ok(()),
            Ok(Sink::Replacement(file)) => file.commit(),
            Err(error) => Err(error.into_error()),
        };
        done.map_err(|error| WriteError::Io {
            file: self.name,
            error,
        })
    }
}
