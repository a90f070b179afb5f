//! Errors as people read them.

/// An error and its causes in one line, each said once: many messages quote their cause already.
#[must_use]
pub fn of(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.contains(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    #[derive(Debug, thiserror::Error)]
    #[error("f.tsv: {error}")]
    struct Quoting {
        #[source]
        error: std::io::Error,
    }

    #[test]
    fn each_cause_is_said_once() {
        let quoting = || Quoting {
            error: std::io::Error::other("it is gone"),
        };
        let error = anyhow::Error::from(quoting());
        assert_eq!(super::of(&error), "f.tsv: it is gone");
        let error = Err::<(), _>(quoting()).context("3 records were stored, then");
        assert_eq!(
            super::of(&error.unwrap_err()),
            "3 records were stored, then: f.tsv: it is gone"
        );
        let plain = anyhow::anyhow!("cause").context("what");
        assert_eq!(super::of(&plain), "what: cause");
    }
}
