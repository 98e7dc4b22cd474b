//! P-22: decode∘encode is the identity, every prefix needs more, too long is refused before allocation,
//! and a concatenation of frames is their sequence however it is cut.

use mvm_protocol::*;
use proptest::{collection::vec, prelude::*};

fn text() -> impl Strategy<Value = String> {
    "[ -~äß€]{0,40}"
}

fn start() -> impl Strategy<Value = Request> {
    (any::<u64>(), vec(text(), 0..5), vec(text(), 0..5), text(), any::<[u64; 3]>(), any::<i16>()).prop_map(
        |(process, args, env, cwd, tokens, oom_score_adj)| {
            Request::Start(Box::new(Start {
                process,
                root: (process % 2 == 0).then(|| cwd.clone()),
                args,
                env,
                cwd: cwd.clone(),
                user: User::Named(cwd),
                stdio: Stdio::Pipes {
                    stdin: Some(Token(tokens[0])),
                    stdout: None,
                    stderr: Some(Token(tokens[2])),
                },
                pid_namespace: PidNamespace::Join(tokens[1]),
                oom_score_adj,
                confinement: confinement(tokens),
            }))
        },
    )
}

fn confinement([a, b, c]: [u64; 3]) -> Confinement {
    Confinement {
        capabilities: (a % 2 == 0).then_some(Capabilities {
            bounding: a,
            effective: b,
            ..Default::default()
        }),
        no_new_privileges: b % 2 == 0,
        rlimits: vec![Rlimit { resource: 7, soft: a, hard: c }],
        umask: Some(0o22),
        seccomp: c.to_le_bytes().into(),
        seccomp_flags: b,
        io_priority: None,
        scheduler: Some(Scheduler { policy: 0, nice: -5, priority: 0 }),
    }
}

fn surroundings() -> impl Strategy<Value = Surroundings> {
    (vec((text(), text(), any::<[u64; 2]>()), 0..4), vec((text(), text()), 0..4), any::<bool>()).prop_map(
        |(mounts, pairs, read_only_root)| Surroundings {
            namespaces: Namespaces {
                ipc: Namespace::Own,
                uts: Namespace::Of("pod".into()),
                ..Default::default()
            },
            mounts: mounts
                .into_iter()
                .map(|(source, target, [flags, propagation])| ContainerMount {
                    source: ContainerSource::Shared(source),
                    data: target.clone(),
                    target,
                    flags,
                    propagation,
                })
                .collect(),
            device_rules: vec![DeviceRule {
                allow: read_only_root,
                kind: Some(DeviceKind::Block),
                major: Some(8),
                minor: None,
                access: "rw".into(),
            }],
            masked_paths: pairs.iter().map(|(path, _)| path.clone()).collect(),
            limits: Limits { files: pairs.clone() },
            sysctls: pairs,
            read_only_root,
            ..Default::default()
        },
    )
}

fn put() -> impl Strategy<Value = Request> {
    let content = prop_oneof![
        Just(PutContent::Directory),
        Just(PutContent::Remove),
        text().prop_map(PutContent::Link),
        (any::<u64>(), vec(any::<u8>(), 0..100), any::<bool>())
            .prop_map(|(offset, bytes, last)| PutContent::File { offset, bytes, last }),
    ];
    (text(), vec((text(), any::<[u32; 3]>(), content), 0..4)).prop_map(|(root, entries)| {
        let entries = entries
            .into_iter()
            .map(|(path, [mode, uid, gid], content)| PutEntry { path, mode, uid, gid, content })
            .collect();
        Request::Put(Put { place: Place::Root(root), entries })
    })
}

fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        Just(Request::Ping),
        Just(Request::List),
        start(),
        (any::<u64>(), any::<i32>()).prop_map(|(process, signal)| Request::Signal {
            process,
            signal,
            target: SignalTarget::Group
        }),
        (any::<u64>(), any::<u16>(), any::<u16>()).prop_map(|(process, rows, columns)| Request::Resize {
            process,
            size: WindowSize { rows, columns }
        }),
        put(),
        (text(), vec((text(), text()), 0..4))
            .prop_map(|(root, files)| Request::Update { root, limits: Limits { files } }),
        (text(), any::<bool>()).prop_map(|(root, frozen)| Request::Freeze { root, frozen }),
        (text(), text(), any::<u64>()).prop_map(|(name, path, offset)| Request::Get(Get {
            place: Place::Shared(name),
            path,
            offset
        })),
        (any::<u16>(), any::<u64>())
            .prop_map(|(port, stream)| Request::Forward { port, stream: Token(stream) }),
        (text(), vec(text(), 0..4), surroundings()).prop_map(
            |(id, layers, surroundings)| Request::SetupRoot(Box::new(SetupRoot {
                id,
                lower: layers.into_iter().map(Lower::Directory).collect(),
                writable: Writable::Tmpfs { size: 1 },
                surroundings,
            }))
        ),
    ]
}

fn message() -> impl Strategy<Value = HostMessage> {
    (any::<u64>(), request()).prop_map(|(id, request)| HostMessage::Request { id, request })
}

fn decode_all(decoder: &mut Decoder) -> Vec<HostMessage> {
    std::iter::from_fn(|| decoder.next_message().unwrap()).collect()
}

proptest! {
    #[test]
    fn what_was_encoded_is_decoded(message in message()) {
        let mut decoder = Decoder::new();
        decoder.push(&encode(&message).unwrap());
        prop_assert_eq!(decode_all(&mut decoder), vec![message]);
    }

    #[test]
    fn every_proper_prefix_of_a_frame_needs_more(message in message()) {
        let frame = encode(&message).unwrap();
        for end in 0..frame.len() {
            let mut decoder = Decoder::new();
            decoder.push(&frame[..end]);
            prop_assert_eq!(decoder.next_message::<HostMessage>(), Ok(None));
        }
    }

    #[test]
    fn frames_arrive_in_order_however_the_bytes_are_cut(
        messages in vec(message(), 0..8),
        cuts in vec(1_usize..40, 1..20),
    ) {
        let bytes: Vec<u8> = messages.iter().flat_map(|message| encode(message).unwrap()).collect();
        let mut decoder = Decoder::new();
        let mut seen = Vec::new();
        let mut rest = &bytes[..];
        for size in cuts.iter().cycle() {
            let (now, later) = rest.split_at((*size).min(rest.len()));
            decoder.push(now);
            seen.extend(decode_all(&mut decoder));
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(seen, messages);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..400)) {
        let mut host = Decoder::new();
        host.push(&bytes);
        while let Ok(Some(_)) = host.next_message::<HostMessage>() {}
        let mut guest = Decoder::new();
        guest.push(&bytes);
        while let Ok(Some(_)) = guest.next_message::<GuestMessage>() {}
        let _ = Hello::version_in(&bytes);
    }

    #[test]
    fn a_frame_with_a_flipped_bit_never_panics(message in message(), at in any::<usize>(), bit in 0..8) {
        let mut frame = encode(&message).unwrap();
        let at = HEADER_LEN + at % (frame.len() - HEADER_LEN);
        frame[at] ^= 1_u8 << bit;
        let mut decoder = Decoder::new();
        decoder.push(&frame);
        let _ = decoder.next_message::<HostMessage>();
    }
}

#[test]
fn a_length_above_the_limit_is_refused_from_its_four_bytes_alone() {
    for length in [limits::MAX_FRAME as u32 + 1, u32::MAX] {
        let mut decoder = Decoder::new();
        decoder.push(&length.to_le_bytes());
        assert_eq!(decoder.next_message::<HostMessage>(), Err(DecodeError::TooLong(length)));
    }
}

#[test]
fn a_length_at_the_limit_waits_for_its_bytes() {
    let mut decoder = Decoder::new();
    decoder.push(&(limits::MAX_FRAME as u32).to_le_bytes());
    assert_eq!(decoder.next_message::<HostMessage>(), Ok(None));
}

#[test]
fn bytes_after_a_message_within_its_frame_are_refused() {
    let mut frame = encode(&HostMessage::Request { id: 1, request: Request::Ping }).unwrap();
    frame.push(0);
    frame[0] += 1;
    let mut decoder = Decoder::new();
    decoder.push(&frame);
    assert_eq!(decoder.next_message::<HostMessage>(), Err(DecodeError::Malformed));
}

#[test]
fn an_empty_frame_is_refused() {
    let mut decoder = Decoder::new();
    decoder.push(&[0; HEADER_LEN]);
    assert_eq!(decoder.next_message::<HostMessage>(), Err(DecodeError::Malformed));
}

#[test]
fn a_message_larger_than_a_frame_is_not_encoded() {
    let request =
        Request::Configure(Configure { hosts: Some("x".repeat(limits::MAX_FRAME)), ..Configure::default() });
    assert!(matches!(encode(&HostMessage::Request { id: 1, request }), Err(EncodeError::TooLong(_))));
}
