//! The operating system, wrapped: the rooms for `unsafe`.
//!
//! | module | what it wraps |
//! | --- | --- |
//! | [`socket`] | sockets: options, addresses, control messages, sending and receiving |

//! | [`ring`] | a mapped AF_PACKET receive ring |
//! | [`netns`] | network namespaces, for tests and measurements |

pub mod netns;
pub mod ring;

pub mod socket;
