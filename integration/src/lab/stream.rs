//! The end of an output channel: virtio ports carry no end-of-file, so a random token closes each stream.

/// Splits a byte stream at its closing token, which may come in pieces.
#[derive(Debug)]
pub(super) struct Tail {
    token: Vec<u8>,
    held: Vec<u8>,
    ended: bool,
}

impl Tail {
    pub(super) fn new(token: &str) -> Self {
        Self { token: format!("{token}\n").into_bytes(), held: Vec::new(), ended: false }
    }

    /// The token has been seen.
    pub(super) fn ended(&self) -> bool {
        self.ended
    }

    /// Takes what arrived and gives back what is certainly not part of the token.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.held.extend_from_slice(bytes);
        if self.held.ends_with(&self.token) {
            self.ended = true;
            self.held.truncate(self.held.len() - self.token.len());
            return std::mem::take(&mut self.held);
        }
        let longest = self.held.len().min(self.token.len() - 1);
        let kept = (1..=longest)
            .rev()
            .find(|&n| self.held.ends_with(self.token.get(..n).unwrap_or_default()))
            .unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - kept);
        std::mem::replace(&mut self.held, rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_pass_at_once_when_they_cannot_be_the_token() {
        let mut tail = Tail::new("abcd");
        assert_eq!(tail.push(b"hello"), b"hello");
        assert!(!tail.ended());
    }

    #[test]
    fn the_token_ends_the_stream_and_is_not_output() {
        let mut tail = Tail::new("abcd");
        assert_eq!(tail.push(b"last wordsabcd\n"), b"last words");
        assert!(tail.ended());
    }

    #[test]
    fn the_token_in_pieces_ends_the_stream() {
        let mut tail = Tail::new("abcd");
        let mut out = Vec::new();
        for byte in b"aababcabcd\n" {
            out.extend(tail.push(&[*byte]));
        }
        assert_eq!(out, b"aababc");
        assert!(tail.ended());
    }

    #[test]
    fn a_false_start_is_given_back() {
        let mut tail = Tail::new("abcd");
        assert_eq!(tail.push(b"xabc"), b"x");
        assert_eq!(tail.push(b"x"), b"abcx");
        assert!(!tail.ended());
    }
}
