//! The same case under KVM and TCG.

use std::sync::OnceLock;

use hyv_host::accel::{self, Accel, AccelRequest, QemuBinary};

/// What runs a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The kernel, where it works.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl Accelerator {
    /// As `--accel` takes it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// KVM if it works here, else TCG.
    #[must_use]
    pub fn best() -> Self {
        match why_no_kvm() {
            None => Self::Kvm,
            Some(_) => Self::Tcg,
        }
    }

    /// Runs `case`, unless this accelerator does not work here: then says why and passes.
    pub fn run(self, case: impl FnOnce(Self)) {
        match why_no_kvm() {
            Some(reason) if self == Self::Kvm => eprintln!("skipped: {reason}"),
            _ => case(self),
        }
    }

    /// QEMU and how to start it.
    ///
    /// # Panics
    /// When there is no QEMU.
    #[must_use]
    pub fn probe(self) -> (QemuBinary, Accel) {
        let request = match self {
            Self::Kvm => AccelRequest::Kvm,
            Self::Tcg => AccelRequest::Tcg,
        };
        accel::probe(request, None).unwrap_or_else(|e| panic!("{e}"))
    }
}

/// Whether KVM takes the processor's model is seen only by trying.
fn why_no_kvm() -> Option<&'static str> {
    static REASON: OnceLock<Option<String>> = OnceLock::new();
    REASON
        .get_or_init(|| match accel::probe(AccelRequest::Auto, None) {
            Ok((_, accel)) => accel.fallback_reason,
            Err(e) => panic!("{e}"),
        })
        .as_deref()
}

/// Makes of each function a test under KVM and one under TCG, `NAME::kvm` and `NAME::tcg`. The argument is the
/// [`Accelerator`].
#[macro_export]
macro_rules! on_each_accelerator {
    ($($(#[$meta:meta])* fn $name:ident($accelerator:ident) $body:block)*) => {$(
        $(#[$meta])*
        mod $name {
            #[allow(unused_imports, reason = "not every case needs what its file uses")]
            use super::*;

            fn case($accelerator: $crate::Accelerator) $body

            #[test]
            fn kvm() {
                $crate::Accelerator::Kvm.run(case);
            }

            #[test]
            fn tcg() {
                $crate::Accelerator::Tcg.run(case);
            }
        }
    )*};
}
