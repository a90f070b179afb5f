//! Files of records by name, `-` for standard input and output.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use super::{Format, OpenError, Reader, WriteError, Writer, is_standard};
use crate::limits::FILE_BUFFER_BYTES;
use hyv_lab::Replacement;

/// Opens `path` (`-`: standard input) for reading, in `explicit` or what its ending says.
///
/// # Errors
/// [`OpenError`] for an ending that says nothing, a directory, or what the system refuses.
pub fn open(
    path: &Path,
    explicit: Option<Format>,
) -> Result<Reader<Box<dyn BufRead + Send>>, OpenError> {
    let format = Format::choose(path, explicit)?;
    if is_standard(path) {
        let input = BufReader::with_capacity(FILE_BUFFER_BYTES, io::stdin());
        return Ok(Reader::new(Box::new(input), format, "standard input"));
    }
    let file = path.display().to_string();
    let opened = File::open(path).and_then(|f| Ok((f.metadata()?.is_dir(), f)));
    match opened {
        Ok((false, f)) => {
            let input = BufReader::with_capacity(FILE_BUFFER_BYTES, f);
            Ok(Reader::new(Box::new(input), format, file))
        }
        Ok((true, _)) => Err(OpenError::Directory { file }),
        Err(error) => Err(OpenError::Io { file, error }),
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
    let out = BufWriter::with_capacity(FILE_BUFFER_BYTES, sink);
    Ok(FileWriter {
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
}

impl FileWriter {
    /// Writes one record.
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub fn write(&mut self, key: &[u8], value: &[u8]) -> Result<(), WriteError> {
        self.writer.write(key, value)
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
