//! Carries RoCEv2 packets between hosts: UDP sockets and AF_PACKET rings behind [`hyv_roce::carrier::Carrier`].
